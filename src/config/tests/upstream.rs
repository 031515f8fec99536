//! What is said about upstreams, forward rules and references between them.

use super::{LISTENER, complaints, load_text, show};

const CLOUD: &str =
    "[[upstream]]\nname = \"cloud\"\nkind = \"http\"\nendpoints = [{ url = \"http://127.0.0.1:3001\" }]\n";
const BROKER: &str = "[[upstream]]\nname = \"broker\"\nkind = \"mqtt\"\nendpoints = [{ url = \"mqtt://127.0.0.1\" }]\n";

fn forward(to: &str, more: &str) -> String {
    format!("[[forward]]\nname = \"f\"\ntopics = [\"dev/+/telemetry/#\"]\nto = \"{to}\"\n{more}")
}

#[test]
fn the_operators_example_is_taken() {
    let text = "
[[upstream]]
name = \"cloud\"
kind = \"http\"
balance = \"least_response_time\"
endpoints = [
  { url = \"http://127.0.0.1:3001\", weight = 2 },
  { url = \"http://127.0.0.1:3002\" },
]
health = { path = \"/healthz\", interval_ms = 5000, timeout_ms = 3000, unhealthy_after = 3, healthy_after = 2 }
eject = { consecutive_errors = 5, base_ms = 30000 }
retry = { attempts_max = 3, budget_percent = 20 }
connections_max = 200

[[upstream]]
name = \"broker\"
kind = \"mqtt\"
endpoints = [{ url = \"mqtt://broker.example\" }]
client_id = \"greenhouse-1\"
subscribe = [\"cmd/greenhouse-1/#\"]

[[forward]]
name = \"telemetry\"
topics = [\"dev/+/telemetry/#\"]
to = \"cloud\"
path = \"/ingest/{device}\"
delivery = \"disk\"
batch = { records_max = 500, bytes_max = 262144, linger_ms = 200, format = \"ndjson\" }
queue = { bytes_max = \"1GiB\", age_max = \"7d\", when_full = \"drop_oldest\", priority = 5, replay_rate_max = \"500/s\" }

[[route]]
name = \"api\"
to = \"cloud\"
";
    assert_eq!(complaints(text), "");
    let config = load_text(&format!("{text}{LISTENER}")).unwrap().config;
    assert_eq!(config.upstream.len(), 2);
    assert_eq!(config.forward.len(), 1);
}

/// What is written behind the cloud and the broker, and exactly what is said.
#[test]
fn every_mistake_about_upstreams_has_its_message() {
    let table = [
        (
            forward("clod", ""),
            "4:6: error: forward.f.to = \"clod\": there is no upstream of this name; allowed: cloud, broker\n",
        ),
        (
            forward("cloud", "path = \"/in/{devise}\"\ntopic = \"x\"\n"),
            "6:9: error: forward.f.topic = \"x\": means nothing here: upstream \"cloud\" is of kind \"http\"\n\
             5:8: error: forward.f.path = \"/in/{devise}\": \"{devise}\" stands for nothing; allowed: {device}, {gateway}, {topic}\n",
        ),
        (
            forward("cloud", "path = \"in\"\n"),
            "5:8: error: forward.f.path = \"in\": not a path; allowed: a path that begins with /\n",
        ),
        (
            forward("broker", "path = \"/\"\ntopic = \"up/#\"\n"),
            "5:8: error: forward.f.path = \"/\": means nothing here: upstream \"broker\" is of kind \"mqtt\"\n\
             6:9: error: forward.f.topic = \"up/#\": not a topic; allowed: text without + and #\n",
        ),
        (
            "[[forward]]\nname = \"f\"\ntopics = [\"dev/#/x\", \"$share/g/x\"]\nto = \"broker\"\n".to_owned(),
            "3:11: error: forward.f.topics.0 = \"dev/#/x\": not a topic filter; allowed: levels separated by /, of which + stands for one \
             and # at the end for the rest\n\
             3:22: error: forward.f.topics.1 = \"$share/g/x\": a rule shares nothing with others; allowed: levels separated by /, of which \
             + stands for one and # at the end for the rest\n",
        ),
        (
            format!("{}[[route]]\nname = \"r\"\nto = \"broker\"\n", forward("cloud", "")),
            "7:6: error: route.r.to = \"broker\": requests cannot be proxied to a broker; allowed: an upstream of kind \"http\"\n",
        ),
    ];
    let mut differ = String::new();
    for (text, expected) in table {
        // Behind the text under test, so that its lines count from one; used, so that nothing is said about that.
        let used = "[[route]]\nname = \"used\"\npath = \"/x\"\nto = \"cloud\"\n[[forward]]\nname = \"used\"\ntopics = [\"x\"]\nto = \"broker\"\n";
        let said = complaints(&format!("{text}{CLOUD}{BROKER}{used}"));
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        if sorted(&said) != sorted(expected) {
            differ.push_str(&format!("--- {text}\n{said}instead of\n{expected}\n"));
        }
    }
    assert!(differ.is_empty(), "{differ}");
}

fn upstream(kind: &str, url: &str, more: &str) -> String {
    format!(
        "[[upstream]]\nname = \"u\"\nkind = \"{kind}\"\nendpoints = [{{ url = \"{url}\" }}]\n{more}[[forward]]\nname = \"f\"\ntopics = [\"x\"]\nto = \"u\"\n"
    )
}

#[test]
fn every_mistake_in_an_upstream_has_its_message() {
    let http = "http://127.0.0.1";
    let table = [
        (
            upstream("http", "127.0.0.1:80", ""),
            "4:22: error: upstream.u.endpoints.0.url = \"127.0.0.1:80\": not a URL of http or https; allowed: http://HOST[:PORT] or https://HOST[:PORT]\n",
        ),
        (
            upstream("http", "http://me:hunter2@x", ""),
            "4:22: error: upstream.u.endpoints.0.url = \"http://me:*******@x\": a user in it; credentials belong in `headers`; allowed: \
             http://HOST[:PORT] or https://HOST[:PORT]\n",
        ),
        (
            upstream(
                "mqtt",
                "http://x",
                "headers = { authorization = \"Bearer hunter2\" }\nhealth = { path = \"/x\" }\n",
            ),
            "4:22: error: upstream.u.endpoints.0.url = \"http://x\": not the address of a broker; allowed: mqtt://HOST[:PORT] or mqtts://HOST[:PORT]\n\
             5:11: error: upstream.u.headers = \"***\": means nothing to kind = \"mqtt\"\n\
             6:19: error: upstream.u.health.path = \"/x\": only an http upstream has paths; without it a check connects and closes\n",
        ),
        (
            upstream("http", http, "client_id = \"x\"\nca_file = \"/nowhere.pem\"\nhealth = { path = \"x\" }\n"),
            "5:13: error: upstream.u.client_id = \"x\": means nothing to kind = \"http\"\n\
             7:19: error: upstream.u.health.path = \"x\": not a path; allowed: a path that begins with /, or nothing\n\
             6:11: warning: upstream.u.ca_file = \"/nowhere.pem\": not used: no endpoint of this upstream speaks TLS; write https:// or mqtts://\n",
        ),
        (
            upstream(
                "http",
                http,
                "headers = { \"content-length\" = \"1\", \"a b\" = \"x\", x-key = \"a\\nhunter2\" }\n",
            ),
            "5:32: error: upstream.u.headers.content-length = \"***\": the gateway's own: it follows from the request\n\
             5:45: error: upstream.u.headers.\"a b\" = \"***\": not the name of a header\n\
             5:58: error: upstream.u.headers.x-key = \"***\": holds characters that a header cannot\n",
        ),
        (
            upstream("http", "https://x", "certificate = \"a.crt\"\n"),
            "1:1: error: upstream.u.key: a certificate is of no use without its key\n",
        ),
        (
            upstream("http", "https://x", "ca_file = \"absent.pem\"\n"),
            "5:11: error: upstream.u.ca_file = \"FOLDER/absent.pem\": cannot read FOLDER/absent.pem: No such file or directory (os error 2)\n",
        ),
        (CLOUD.to_owned(), "2:8: warning: upstream.cloud.name = \"cloud\": not used: no rule and no route names it\n"),
        (
            format!("{CLOUD}{}", forward("cloud", "")).replace(
                "endpoints = [{ url = \"http://127.0.0.1:3001\" }]",
                "endpoints = [{ url = \"http://a\" }, { url = \"http://a\" }]",
            ),
            "4:44: error: upstream.cloud.endpoints.1.url = \"http://a\": the endpoint is listed twice; raise its `weight` instead\n",
        ),
    ];
    let mut differ = String::new();
    for (text, expected) in table {
        let said = complaints(&text);
        if said != expected {
            differ.push_str(&format!("--- {text}\n{said}instead of\n{expected}\n"));
        }
    }
    assert!(differ.is_empty(), "{differ}");
}

#[test]
fn no_header_is_shown() {
    let headers = "headers = { authorization = \"Bearer hunter2\", x-tenant = \"hunter2\" }\n";
    let loaded = load_text(&format!("{}{LISTENER}", upstream("http", "http://x", headers))).unwrap();
    assert!(!show::toml(&loaded).contains("hunter2"));
    assert!(!show::json(&loaded).to_string().contains("hunter2"));
}

#[test]
fn the_disk_is_not_promised_twice() {
    let rule = |name: &str| {
        format!(
            "[[forward]]\nname = \"{name}\"\ntopics = [\"x\"]\nto = \"cloud\"\nqueue = {{ bytes_max = \"3GiB\" }}\n"
        )
    };
    let said = complaints(&format!("{}{}{CLOUD}", rule("a"), rule("b")));
    assert!(
        said.contains("limits.spool_bytes_max = \"4GiB\": the queues of all [[forward]] may hold 6GiB together"),
        "{said}"
    );
    let enough = format!("[limits]\nspool_bytes_max = \"6GiB\"\n{}{}{CLOUD}", rule("a"), rule("b"));
    assert_eq!(complaints(&enough), "");
}
