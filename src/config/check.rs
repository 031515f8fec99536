//! What one key cannot say alone: references between tables, duplicate names, combinations that make no sense or are unsafe.

use std::collections::HashMap;

use super::Config;
use super::document::{Node, Step};
use super::problem::Problem;

/// Appends everything that is wrong or doubtful. `config` may lack what was already refused; names are therefore taken from the document.
pub fn check(config: &Config, document: &Node, problems: &mut Vec<Problem>) {
    let mut check = Check { config, document, problems };
    check.gateway();
    check.duplicate_names();
}

struct Check<'a> {
    config: &'a Config,
    document: &'a Node,
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    fn gateway(&mut self) {
        let prefix = &self.config.gateway.device_api_prefix;
        if !prefix.is_empty() && (!prefix.starts_with('/') || prefix.ends_with('/')) {
            self.report(
                &["gateway", "device_api_prefix"],
                Problem::error("not a path prefix")
                    .allowed("text such as \"/iot\": begins with `/`, does not end with it"),
            );
        }
    }

    /// Lists whose entries are referred to by name: a name may stand once.
    fn duplicate_names(&mut self) {
        for entry in self.document.entries() {
            let mut seen: HashMap<&str, usize> = HashMap::new();
            for (index, item) in entry.node.items().iter().enumerate() {
                let Some(name) = item.name() else { continue };
                if let Some(first) = seen.insert(name, index) {
                    let place = item.get("name").map(|n| n.at).unwrap_or(item.at);
                    let key = format!("{}.{index}.name", entry.key);
                    self.problems.push(
                        Problem::error(format!("the name is taken by entry {first} of the list"))
                            .key(key)
                            .value(super::document::quoted(name))
                            .at(place)
                            .allowed("names that differ within one list"),
                    );
                }
            }
        }
    }

    /// Fills in key, value and place of a problem with one key.
    fn report(&mut self, path: &[&str], problem: Problem) {
        let path: Vec<Step> = path.iter().map(|s| Step::Key((*s).to_owned())).collect();
        let problem = problem.key(self.document.render_path(&path));
        self.problems.push(match self.document.at_path(&path) {
            Some(node) => problem.value(node).at(node.at),
            None => problem,
        });
    }
}
