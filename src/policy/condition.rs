//! `when`: a CEL expression, compiled at load, evaluated only on a rule that matches already.
//!
//! Variables: `msg.size` (payload bytes), `msg.topic` (the topic, filter or path), `device.id`, `device.role`, `device.attrs` (text by key;
//! `has(device.attrs.site)` asks whether it is there), `time.hour`, `time.minute`, `time.minute_of_day` (the gateway's local time),
//! `protocol` (`"mqtt"`, `"http"`, `"coap"`), `action` (as in `do`). Functions: CEL's standard library.
//!
//! The cost of an evaluation is bounded by the length of the text: there are no loops, for the comprehension macros (`all`, `exists`,
//! `map`, `filter`) are refused, and the parser bounds the depth. A name that does not exist is found at load, not at night.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use cel::common::ast::{EntryExpr, Expr, IdedExpr};
use cel::common::types::CelString;
use cel::common::value::CowVal;
use cel::context::VariableResolver;
use cel::{Context, Env, ExecutionError, Program, Value};

use super::Query;

pub(super) const BYTES_MAX: usize = 1_024;

/// One compiled expression.
#[derive(Debug)]
pub(super) struct Condition {
    program: Program,
}

/// The expression gave an error, or something other than true and false.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EvaluationError(pub String);

/// The environment is the same for all, and costs too much to build for each.
static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

impl Condition {
    /// # Errors
    /// What is wrong, as a clause.
    pub fn compile(text: &str) -> Result<Self, String> {
        if text.len() > BYTES_MAX {
            return Err(format!("is longer than {BYTES_MAX} bytes"));
        }
        let program = ENV.compile(text).map_err(|errors| {
            let all: Vec<String> = errors.errors.iter().map(|e| e.msg.clone()).collect();
            format!("is not a CEL expression: {}", all.join("; "))
        })?;
        check(program.expression())?;
        let condition = Condition { program };
        condition.try_on_a_sample()?;
        Ok(condition)
    }

    pub fn holds(&self, query: &Query<'_>) -> Result<bool, EvaluationError> {
        let variables = Variables(query);
        let mut context = Context::with_env(Arc::clone(&ENV));
        context.set_variable_resolver(&variables);
        match self.program.execute(&context) {
            Ok(Value::Bool(answer)) => Ok(answer),
            Ok(other) => Err(EvaluationError(format!("gives {}, not true or false", other.type_of()))),
            Err(error) => Err(EvaluationError(error.to_string())),
        }
    }

    /// Finds expressions that can never give true or false. An attribute that the sample lacks proves nothing.
    fn try_on_a_sample(&self) -> Result<(), String> {
        let sample = Query {
            device: None,
            role: "role",
            action: crate::message::Action::Publish,
            resource: "a/b",
            size: 1,
            minute_of_day: 0,
            protocol: crate::message::Protocol::Mqtt,
        };
        let variables = Variables(&sample);
        let mut context = Context::with_env(Arc::clone(&ENV));
        context.set_variable_resolver(&variables);
        match self.program.execute(&context) {
            Ok(Value::Bool(_)) => Ok(()),
            Ok(other) => Err(format!("gives {}, not true or false", other.type_of())),
            // These depend on the values; every other error is one of types or names, and stays.
            Err(
                ExecutionError::NoSuchKey(_)
                | ExecutionError::DivisionByZero(_)
                | ExecutionError::RemainderByZero(_)
                | ExecutionError::Overflow(..)
                | ExecutionError::IndexOutOfBounds(_)
                | ExecutionError::FunctionError { .. },
            ) => Ok(()),
            Err(error) => Err(format!("cannot be evaluated: {error}")),
        }
    }
}

const MEMBERS: [(&str, &[&str]); 3] =
    [("msg", &["size", "topic"]), ("device", &["id", "role", "attrs"]), ("time", &["hour", "minute", "minute_of_day"])];
const PLAIN: [&str; 2] = ["protocol", "action"];

/// Walks the tree once: no loops, no unknown names.
fn check(expression: &IdedExpr) -> Result<(), String> {
    match &expression.expr {
        Expr::Unspecified | Expr::Literal(_) => Ok(()),
        Expr::Comprehension(_) => {
            Err("uses all, exists, map or filter, which could run for long; use `in`, && and ||".into())
        }
        Expr::Ident(name) if PLAIN.contains(&name.as_str()) => Ok(()),
        Expr::Ident(name) => match MEMBERS.iter().find(|(root, _)| root == name) {
            Some((root, members)) => Err(format!("uses `{root}` as a whole; it has {}", members.join(", "))),
            None => {
                Err(format!("uses `{name}`, which does not exist; there are msg, device, time, protocol and action"))
            }
        },
        Expr::Select(select) => match &select.operand.expr {
            Expr::Ident(root) => match MEMBERS.iter().find(|(name, _)| name == root) {
                Some((_, members)) if members.contains(&select.field.as_str()) => Ok(()),
                Some((_, members)) => Err(format!("uses `{root}.{}`; {root} has {}", select.field, members.join(", "))),
                None => check(&select.operand),
            },
            _ => check(&select.operand),
        },
        Expr::Call(call) => {
            if let Some(target) = &call.target {
                check(target)?;
            }
            call.args.iter().try_for_each(check)
        }
        Expr::List(list) => list.elements.iter().try_for_each(check),
        Expr::Map(map) => map.entries.iter().try_for_each(|entry| check_entry(&entry.expr)),
        Expr::Struct(made) => made.entries.iter().try_for_each(|entry| check_entry(&entry.expr)),
    }
}

fn check_entry(entry: &EntryExpr) -> Result<(), String> {
    match entry {
        EntryExpr::StructField(field) => check(&field.value),
        EntryExpr::MapEntry(pair) => check(&pair.key).and_then(|()| check(&pair.value)),
    }
}

/// Builds a variable when the expression asks for it.
struct Variables<'q>(&'q Query<'q>);

impl VariableResolver for Variables<'_> {
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        let query = self.0;
        let map = |entries: Vec<(&str, Value)>| -> Option<CowVal<'b, 'b>> {
            let entries: HashMap<String, Value> = entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            Value::from(entries).try_into().ok().map(CowVal::Owned)
        };
        let text = |text: &str| Value::from(text.to_owned());
        match variable {
            "protocol" => Some(CowVal::owned(CelString::from(query.protocol.as_str()))),
            "action" => Some(CowVal::owned(CelString::from(query.action.as_str()))),
            "msg" => map(vec![
                ("size", Value::Int(i64::try_from(query.size).unwrap_or(i64::MAX))),
                ("topic", text(query.resource)),
            ]),
            "time" => map(vec![
                ("hour", Value::Int(i64::from(query.minute_of_day / 60))),
                ("minute", Value::Int(i64::from(query.minute_of_day % 60))),
                ("minute_of_day", Value::Int(i64::from(query.minute_of_day))),
            ]),
            "device" => {
                let attrs: HashMap<String, Value> = query
                    .device
                    .map(|d| d.attributes.iter().map(|(k, v)| (k.to_string(), text(v))).collect())
                    .unwrap_or_default();
                map(vec![
                    ("id", text(query.device.map_or("", |d| d.id.as_str()))),
                    ("role", text(query.role)),
                    ("attrs", Value::from(attrs)),
                ])
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Action, Device, DeviceId, Protocol};

    fn device() -> Device {
        Device {
            id: DeviceId::parse("dev-1").unwrap(),
            index: 1,
            generation: 0,
            role: "sensor".into(),
            attributes: vec![("floor".into(), "3".into()), ("site".into(), "north".into())],
        }
    }

    fn holds(text: &str) -> Result<bool, EvaluationError> {
        let device = device();
        Condition::compile(text).unwrap().holds(&Query {
            device: Some(&device),
            role: "sensor",
            action: Action::Publish,
            resource: "dev/dev-1/telemetry",
            size: 4096,
            minute_of_day: 13 * 60 + 5,
            protocol: Protocol::Coap,
        })
    }

    #[test]
    fn every_variable_has_its_value() {
        for text in [
            "msg.size <= 4096",
            "msg.topic.startsWith('dev/')",
            "device.id == 'dev-1' && device.role == 'sensor'",
            "device.attrs.site == 'north'",
            "device.attrs['floor'] == '3'",
            "has(device.attrs.site) && !has(device.attrs.room)",
            "time.hour == 13 && time.minute == 5 && time.minute_of_day == 785",
            "protocol in ['coap', 'mqtt']",
            "action == 'publish'",
            "msg.topic.endsWith(device.id + '/telemetry')",
        ] {
            assert_eq!(holds(text), Ok(true), "{text}");
        }
        assert_eq!(holds("msg.size > 4096"), Ok(false));
    }

    #[test]
    fn a_missing_attribute_is_an_error_and_not_an_answer() {
        assert!(holds("device.attrs.room == 'x'").is_err());
        assert!(holds("1 / (msg.size - 4096) == 1").is_err());
    }

    #[test]
    fn what_can_never_work_is_refused_at_load() {
        for text in [
            "",
            "msg.size <",
            "msg.sise < 3",
            "user.id == 'x'",
            "msg == 1",
            "msg.size",
            "msg.size + 'a'",
            "device.nope()",
            "[1, 2].all(x, x > 0)",
            "[1,2,3].map(x, x * 2) == []",
        ] {
            assert!(Condition::compile(text).is_err(), "{text}");
        }
        let long = format!("msg.size < {}1", "1 + ".repeat(300));
        assert!(Condition::compile(&long).is_err());
        let deep = format!("{}msg.size < 1{}", "(".repeat(400), ")".repeat(400));
        assert!(Condition::compile(&deep).is_err());
    }
}
