//! Warnings about routes that no request reaches.

use super::*;

fn route(name: &str, more: &str) -> String {
    format!("[[route]]\nname = \"{name}\"\nauth = \"none\"\nanswer = {{}}\n{more}\n")
}

#[test]
fn what_no_request_reaches_is_warned_of() {
    let table = [
        ("path_prefix = \"/api\"", ""),
        ("path = \"/a b\"", ""),
        (
            "path_prefix = \"/%61pi\"",
            "5:15: warning: route.r.path_prefix = \"/%61pi\": never used: paths are compared decoded; allowed: \"/api\"\n",
        ),
        (
            "path = \"/a//b\"",
            "5:8: warning: route.r.path = \"/a//b\": never used: no request has such a path (//, a dot segment, ?, # or \\)\n",
        ),
        (
            "path_prefix = \"/telemetry/\"",
            "5:15: warning: route.r.path_prefix = \"/telemetry/\": never used: the device API answers this path; `gateway.device_api_prefix` moves the device API elsewhere\n",
        ),
        ("path_prefix = \"/topics\"", ""),
        ("path_prefix = \"/state\"", ""),
        (
            "path = \"/state\"",
            "5:8: warning: route.r.path = \"/state\": never used: the device API answers this path; `gateway.device_api_prefix` moves the device API elsewhere\n",
        ),
        (
            "host = \"a.example:8080\"",
            "5:8: warning: route.r.host = \"a.example:8080\": never used: hosts are compared without their port; allowed: \"a.example\"\n",
        ),
        ("host = \"[::1]\"", ""),
    ];
    let mut differ = String::new();
    for (more, expected) in table {
        let said = complaints(&route("r", more));
        if said != expected {
            differ.push_str(&format!("--- {more}\n{said}instead of\n{expected}\n"));
        }
    }
    assert!(differ.is_empty(), "{differ}");
    assert_eq!(complaints(&format!("[gateway]\ndevice_api_prefix = \"/gw\"\n{}", route("r", "path = \"/state\""))), "");
}

#[test]
fn a_route_behind_others_is_warned_of() {
    let text = [
        route("below", "host = \"*.example\"\nmethods = [\"GET\"]"),
        route("post", "methods = [\"POST\", \"PUT\"]"),
        route("both", "host = \"a.example\"\nmethods = [\"GET\", \"PUT\"]"),
        route("rest", ""),
    ];
    let said = complaints(&text.concat());
    assert_eq!(
        said,
        "13:8: warning: route.both.name = \"both\": never used: routes \"below\", \"post\" take all it would\n"
    );
}

#[test]
fn routes_without_a_listener_for_them_are_warned_of() {
    let text = format!("{}[[listener]]\nname = \"mqtt\"\nprotocols = [\"mqtt\"]\n", route("r", ""));
    let said = load_text(&text).unwrap().report.to_string();
    assert!(
        said.contains("warning: route.r.name = \"r\": never used, as all routes: no listener speaks http or coap"),
        "{said}"
    );
    assert_eq!(complaints(&route("r", "")), "");
}
