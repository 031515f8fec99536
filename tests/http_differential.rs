//! The same bytes to Tidegate, to nginx and to HAProxy, each before an origin that keeps what it was asked. What Tidegate does stands with the case;
//! every difference is explained below, an explanation that is no longer needed is an error, and what all three do is written down in
//! `docs/conformance/http-differential.md` (`TIDEGATE_BLESS=1` writes it anew).
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use support::origin::{Asked, Origin};
use support::{Gateway, Wanted, proxies};

/// One request, or what should be none; [`NEXT`] follows it on the same connection.
struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    /// What Tidegate does with it, as [`outcome`] puts it.
    ours: &'static str,
}

/// Behind every case, so that the end of the connection tells that all was answered: no test waits for silence.
const NEXT: &str = "GET /next HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Nginx,
    Haproxy,
}

/// Where a peer does otherwise, and why we do as we do.
const EXPLAINED: &[(Peer, &str, &[&str])] = &[
    (
        Peer::Nginx,
        "it says 501 or 505 where we say 400",
        &[
            "coding unknown",
            "coding before chunked",
            "coding after chunked",
            "identity",
            "identity and length",
            "chunked twice in a list",
            "chunked with a vertical tab",
            "chunked in quotes",
            "chunked with a parameter",
            "empty coding",
            "empty element before chunked",
            "HTTP/2.0",
            "HTTP/3.0",
        ],
    ),
    (
        Peer::Haproxy,
        "it says 422, or 400 for what is too large",
        &[
            "coding before chunked",
            "empty element before chunked",
            "target of 20 KiB",
            "header of 20 KiB",
            "300 headers",
        ],
    ),
    (
        Peer::Nginx,
        "it says 414 or 400 for what is too large, and 405 for TRACE",
        &["target of 20 KiB", "header of 20 KiB", "TRACE"],
    ),
    (
        Peer::Haproxy,
        "it passes on what RFC 9112 lets a server refuse and calls an attack (section 6.1): both framings at once, or chunks in HTTP/1.0; the connection ends after it",
        &["length and chunked", "chunked and length", "length and chunked in HTTP/1.0", "chunked in HTTP/1.0"],
    ),
    (
        Peer::Haproxy,
        "one length said twice may be taken as once (RFC 9112 section 6.3); who sends it is broken or probes, and we refuse",
        &["one length twice", "list of one length"],
    ),
    (Peer::Haproxy, "it takes a length beyond 64 bits for another one", &["length beyond 64 bits"]),
    (
        Peer::Haproxy,
        "it unfolds header lines, which RFC 9112 section 5.2 lets a server refuse",
        &["chunked folded", "folded header", "folded with a tab", "trailer folded"],
    ),
    (
        Peer::Haproxy,
        "it passes header names with an underscore that a CGI backend reads as framing",
        &["length with an underscore", "underscore for chunked"],
    ),
    (
        Peer::Nginx,
        "it drops names with an underscore; we drop only those that imitate what the gateway says",
        &["underscore in a name"],
    ),
    (
        Peer::Nginx,
        "it knows no tab before a coding, though RFC 9110 section 5.6.3 does",
        &["chunked with a tab", "space around a value"],
    ),
    (
        Peer::Nginx,
        "it is laxer in chunks than RFC 9112 section 7.1: white space behind the size, bare line feeds, sizes and extensions of any length",
        &[
            "chunk size with a space behind",
            "chunk size with a tab behind",
            "chunk size with many zeros before",
            "chunk with a bare line feed in its extension",
            "chunk size that ends in a bare line feed",
            "chunk that ends in a bare line feed",
            "chunk extension of 2 KiB",
        ],
    ),
    (
        Peer::Haproxy,
        "it is laxer in chunks than RFC 9112 section 7.1: white space behind the size, bare line feeds, sizes and extensions of any length",
        &[
            "chunk size with a space behind",
            "chunk size with a tab behind",
            "chunk size with many zeros before",
            "chunk with a bare line feed in its extension",
            "chunk size that ends in a bare line feed",
            "chunk that ends in a bare line feed",
            "chunk extension of 2 KiB",
        ],
    ),
    (
        Peer::Nginx,
        "it does not look at trailers, nor for the end of the last chunk",
        &["last chunk without its line end", "trailer folded", "trailer without a colon", "trailer of 20 KiB"],
    ),
    (
        Peer::Haproxy,
        "it passes on trailers that no Trailer header announced, as they are",
        &["trailer", "trailer with a length"],
    ),
    (
        Peer::Nginx,
        "it takes a line feed alone for a line end, which RFC 9112 section 2.2 allows and smugglers use",
        &[
            "bare line feeds",
            "bare line feed after the request line",
            "bare line feed after a header",
            "bare line feed as the end of the head",
        ],
    ),
    (
        Peer::Haproxy,
        "it takes a line feed alone for a line end, which RFC 9112 section 2.2 allows and smugglers use",
        &[
            "bare line feeds",
            "bare line feed after the request line",
            "bare line feed after a header",
            "bare line feed as the end of the head",
        ],
    ),
    (
        Peer::Nginx,
        "it lets control characters stand in values or targets (RFC 9110 section 5.5 forbids them)",
        &["control character in a value", "delete in a value"],
    ),
    (
        Peer::Haproxy,
        "it lets control characters stand in values or targets (RFC 9110 section 5.5 forbids them)",
        &["NUL in a value", "control character in a value", "delete in a value", "delete in the target"],
    ),
    (
        Peer::Nginx,
        "it drops header lines that are malformed and serves the request; RFC 9112 section 5.1 and 2.2 want 400",
        &["letters beyond ASCII in a name", "header without a colon", "parenthesis in a name", "slash in a name"],
    ),
    (
        Peer::Nginx,
        "it closes after a request that is well framed and yet refused; we go on, and a client behind a shared connection is not cut",
        &[
            "no host",
            "host twice",
            "two hosts",
            "host with a path",
            "host with a space",
            "list of hosts",
            "absolute-form without a host",
            "asterisk of options",
            "connect",
            "dot segments above the root",
            "NUL encoded",
            "encoding cut off",
            "encoding of no hex",
            "absolute-form with a user",
            "host of IPv6 without brackets",
        ],
    ),
    (Peer::Haproxy, "it closes after a request that is well framed and yet refused", &["two hosts"]),
    (
        Peer::Haproxy,
        "it does not look at Host (RFC 9112 section 3.2 wants 400)",
        &[
            "no host",
            "host twice",
            "host with a path",
            "host with a user",
            "host with a space",
            "list of hosts",
            "host with a question mark",
            "host with a backslash",
            "host with a port of letters",
            "host of IPv6 without brackets",
            "absolute-form without a host",
            "absolute-form with a user",
        ],
    ),
    (
        Peer::Nginx,
        "it takes a host that RFC 9112 section 3.2 wants refused",
        &["host with a user", "host with a question mark", "host with a backslash", "host with a port of letters"],
    ),
    (
        Peer::Nginx,
        "its $host is in small letters, without port and without a dot behind",
        &["host with a port", "host in capitals", "host with a dot behind"],
    ),
    (Peer::Nginx, "an empty Host is one (RFC 9112 section 3.2)", &["empty host"]),
    (
        Peer::Nginx,
        "an HTTP/1.1 request to the origin has a Host, even if the client's HTTP/1.0 had none",
        &["no host in HTTP/1.0"],
    ),
    (
        Peer::Haproxy,
        "an HTTP/1.1 request to the origin has a Host, even if the client's HTTP/1.0 had none",
        &["no host in HTTP/1.0"],
    ),
    (
        Peer::Haproxy,
        "it passes the absolute-form on as it is; RFC 9112 section 3.2.1 has origin-form for origins",
        &["absolute-form", "absolute-form of https", "absolute-form without a path", "absolute-form of another scheme"],
    ),
    (
        Peer::Haproxy,
        "it refuses an absolute-form that differs from Host; by RFC 9112 section 3.2.2 the target wins",
        &["absolute-form and another host"],
    ),
    (Peer::Haproxy, "a query may follow the authority (RFC 3986 section 3)", &["absolute-form with a query alone"]),
    (
        Peer::Nginx,
        "our listener tells protocols apart by the first bytes, and closes at once what begins like none of them",
        &[
            "authority-form",
            "asterisk",
            "target without a slash",
            "two spaces after the method",
            "space before the method",
            "tab for a space",
            "empty line before",
            "many empty lines before",
            "bare line feed before",
            "method with a character it may not have",
            "method of nothing",
            "PRI",
            "GARBAGE before",
            "method of 300 letters",
            "absolute-form of another scheme",
        ],
    ),
    (
        Peer::Haproxy,
        "our listener tells protocols apart by the first bytes, and closes at once what begins like none of them",
        &[
            "authority-form",
            "asterisk",
            "target without a slash",
            "two spaces after the method",
            "space before the method",
            "tab for a space",
            "empty line before",
            "many empty lines before",
            "bare line feed before",
            "method with a character it may not have",
            "method of nothing",
            "PRI",
            "GARBAGE before",
            "method of 300 letters",
        ],
    ),
    (
        Peer::Haproxy,
        "it is set up as a reverse proxy and passes CONNECT, TRACE and the asterisk all the same",
        &["asterisk of options", "connect", "TRACE"],
    ),
    (
        Peer::Nginx,
        "it passes on a path that programs read differently, whatever its own rules took it for; our rules hold for one spelling",
        &[
            "two slashes",
            "dot segments",
            "dot segments encoded",
            "dot segments half encoded",
            "slash encoded",
            "backslash",
            "backslash encoded",
            "line feed encoded",
            "overlong UTF-8",
        ],
    ),
    (
        Peer::Haproxy,
        "it passes on a path that programs read differently, whatever its own rules took it for; our rules hold for one spelling",
        &[
            "two slashes",
            "dot segments",
            "dot segments encoded",
            "dot segments half encoded",
            "slash encoded",
            "backslash",
            "backslash encoded",
            "line feed encoded",
            "overlong UTF-8",
            "dot segments above the root",
            "NUL encoded",
            "encoding cut off",
            "encoding of no hex",
        ],
    ),
    (Peer::Nginx, "it passes on what is no target (RFC 3986 section 3.3)", &["query with a quote", "fragment"]),
    (Peer::Haproxy, "it passes on what is no target (RFC 3986 section 3.3)", &["query with a quote"]),
    (
        Peer::Haproxy,
        "it takes no letters beyond ASCII in a target; devices send them, and they have one reading",
        &["letters beyond ASCII in the target"],
    ),
    (
        Peer::Nginx,
        "it is laxer in the request line (RFC 9112 section 3 has one space)",
        &["two spaces before the version", "space behind the version"],
    ),
    (
        Peer::Haproxy,
        "it is laxer in the request line (RFC 9112 section 3 has one space)",
        &["two spaces before the version"],
    ),
    (Peer::Nginx, "it speaks HTTP/0.9", &["HTTP/0.9", "no version"]),
    (Peer::Nginx, "it serves versions that do not exist", &["HTTP/1.2", "HTTP/1.10"]),
    (Peer::Haproxy, "it serves versions that do not exist", &["HTTP/2.0", "HTTP/3.0", "HTTP/1.2"]),
    (
        Peer::Nginx,
        "methods are case-sensitive (RFC 9110 section 9.1) and any token is one",
        &["method in small letters"],
    ),
    (
        Peer::Nginx,
        "it passes hop-by-hop headers on (RFC 9110 section 7.6.1)",
        &["connection names a header", "proxy-connection", "proxy-authorization", "h2c upgrade"],
    ),
    (
        Peer::Haproxy,
        "it passes hop-by-hop headers on (RFC 9110 section 7.6.1); it is meant to be seen through",
        &[
            "connection names a header",
            "connection names host",
            "connection names content-length",
            "connection names transfer-encoding",
            "connection names x-forwarded-for",
            "connection names authorization",
            "connection of bad characters",
            "keep-alive",
            "proxy-connection",
            "te",
            "te of gzip",
            "proxy-authorization",
            "h2c upgrade",
            "upgrade to another protocol",
            "upgrade without connection",
            "upgrade in HTTP/1.0",
            "upgrade with a body",
        ],
    ),
    (
        Peer::Nginx,
        "it does not pass TE: trailers or an upgrade on unless it is told to",
        &["te", "upgrade to another protocol", "upgrade with a body"],
    ),
    (
        Peer::Haproxy,
        "it passes Expect on; we answer it when the body is wanted, and only HTTP/1.1 gets a 100 (RFC 9110 section 10.1.1)",
        &["expect 100-continue", "expect without a body", "expect something else", "expect 100-continue in HTTP/1.0"],
    ),
    (Peer::Nginx, "it sends a 100 though no body follows", &["expect without a body"]),
    (Peer::Nginx, "it takes one Authorization; who it is for decides here", &["authorization twice"]),
    (Peer::Nginx, "it closes without a word when a body does not come; we say 408", &["body shorter than it says"]),
    (
        Peer::Haproxy,
        "it has sent the head to the origin and says 504 when a body does not come; we say 408",
        &["body shorter than it says"],
    ),
    (Peer::Haproxy, "it has other limits for lines and names", &["name of 7 KiB"]),
    (Peer::Nginx, "it has no limit for the number of headers", &["300 headers"]),
    (
        Peer::Haproxy,
        "a name of a header is no line of another: it takes the rest of what came for the value",
        &["head without an end"],
    ),
];

#[test]
fn every_difference_to_nginx_and_haproxy_is_explained() {
    let cases = cases();
    let origins = [Origin::start(), Origin::start(), Origin::start()];
    let limits = format!(
        "header_timeout_ms = {0}\nbody_timeout_ms = {0}\nidle_timeout = \"{1}s\"\n",
        PATIENCE_SECS * 1000,
        PATIENCE_SECS
    );
    let extra = format!(
        "[[upstream]]\nname = \"origin\"\nkind = \"http\"\nendpoints = [{{ url = \"http://{}\" }}]\n\n\
         [[route]]\nname = \"all\"\npath_prefix = \"/\"\nto = \"origin\"\nauth = \"none\"\npreserve_host = true\n",
        origins[0].address
    );
    let gateway = Gateway::start(&Wanted { limits, extra, ..Wanted::default() });
    let folder = tempfile::tempdir().unwrap();
    let (_nginx, nginx) = proxies::nginx(folder.path(), origins[1].address, PATIENCE_SECS);
    let (_haproxy, haproxy) = proxies::haproxy(folder.path(), origins[2].address, PATIENCE_SECS);
    let [ours, nginx, haproxy] = thread::scope(|scope| {
        let servers = [gateway.plain, nginx, haproxy];
        let cases = &cases;
        let running = [0, 1, 2].map(|n| {
            let (server, origin) = (servers[n], &origins[n]);
            scope.spawn(move || {
                cases.iter().map(|case| (case.name, outcome(server, origin, &case.bytes))).collect::<BTreeMap<_, _>>()
            })
        });
        running.map(|thread| thread.join().unwrap())
    });
    let mut faults = Vec::new();
    for case in &cases {
        let name = case.name;
        if ours[name] != case.ours {
            faults.push(format!("{name}: Tidegate\n    is to {}\n    does  {}", case.ours, ours[name]));
        }
        for (peer, theirs) in [(Peer::Nginx, &nginx[name]), (Peer::Haproxy, &haproxy[name])] {
            let explained = EXPLAINED.iter().find(|(who, _, names)| *who == peer && names.contains(&name));
            match (ours[name] == *theirs, explained) {
                (true, None) | (false, Some(_)) => {}
                (true, Some((_, why, _))) => faults.push(format!("{name}: {peer:?} does as we do, but: {why}")),
                (false, None) => {
                    faults.push(format!("{name}: {peer:?}\n    ours   {}\n    theirs {theirs}", ours[name]))
                }
            }
        }
    }
    for name in EXPLAINED.iter().flat_map(|(_, _, names)| *names) {
        assert!(cases.iter().any(|case| case.name == *name), "{name} is no case");
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
    let table = table(&cases, &[&ours, &nginx, &haproxy]);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/conformance/http-differential.md");
    if std::env::var_os("TIDEGATE_BLESS").is_some() {
        fs::write(&file, &table).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    let changed: Vec<_> = table.lines().filter(|line| !written.lines().any(|other| other == *line)).collect();
    assert!(
        written == table,
        "{} is not what is done now; TIDEGATE_BLESS=1 writes it anew\n{}",
        file.display(),
        changed.join("\n")
    );
}

/// How long a silent client is waited for, by each of the three.
const PATIENCE_SECS: u32 = 2;
/// How long a server may take to close; only a server that hangs needs it.
const HANGS: Duration = Duration::from_secs(30);

/// What a server makes of the bytes: the statuses of its answers, and what the origin was asked for. It is `closed` if [`NEXT`] was not served.
fn outcome(server: SocketAddr, origin: &Origin, bytes: &[u8]) -> String {
    origin.take();
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(HANGS)).unwrap();
    // It may close while we are still sending.
    let _ = stream.write_all(&[bytes, NEXT.as_bytes()].concat());
    let mut said = Vec::new();
    let ended = stream.read_to_end(&mut said);
    let _ = stream.shutdown(Shutdown::Both);
    let mut text = statuses(&said);
    if let Err(error) = ended
        && !matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
    {
        write!(text, " and does not close").unwrap();
    }
    let (next, asked): (Vec<Asked>, _) = origin.take().into_iter().partition(|asked| asked.line() == "GET /next");
    if next.is_empty() {
        text += " closed";
    }
    for asked in &asked {
        write!(text, "; {}", described(asked, origin)).unwrap();
    }
    text
}

/// A request at the origin, without what differs by right: framing, and what a proxy says of itself.
fn described(asked: &Asked, origin: &Origin) -> String {
    let host = asked.header("host").unwrap_or("nobody");
    let host = if host == origin.address.to_string() { "itself" } else { host };
    let mut text = format!("{} @{}", short(asked.line()), host);
    let mut unusual: Vec<String> = Vec::new();
    for (name, value) in asked.headers() {
        let is_usual =
            matches!(&*name, "host" | "content-length" | "transfer-encoding" | "via" | "forwarded" | "x-request-id")
                || name.starts_with("x-forwarded-")
                || (name == "connection" && ["close", "keep-alive"].contains(&value));
        if !is_usual {
            unusual.push(format!(", {}: {}", short(&name), short(value)));
        }
    }
    let count = unusual.len();
    unusual.dedup();
    text += &unusual.concat();
    if count > unusual.len() {
        write!(text, " ({count} times)").unwrap();
    }
    if !asked.body.is_empty() {
        write!(text, " \"{}\"", short(&asked.body.escape_ascii().to_string())).unwrap();
    }
    for trailer in &asked.trailers {
        write!(text, ", trailer {}", short(trailer)).unwrap();
    }
    text
}

fn short(text: &str) -> String {
    if text.len() > 80 { format!("({} bytes)", text.len()) } else { text.to_owned() }
}

/// The statuses of the answers in these bytes.
fn statuses(mut said: &[u8]) -> String {
    let mut statuses = Vec::new();
    while !said.is_empty() {
        let Some(end) = said.windows(4).position(|four| four == b"\r\n\r\n").filter(|_| said.starts_with(b"HTTP/1."))
        else {
            statuses.push("(no HTTP/1.1)".to_owned());
            break;
        };
        let head = String::from_utf8_lossy(&said[..end]).to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap_or_default().lines().next().unwrap_or_default().to_owned();
        said = &said[end + 4..];
        let header =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        if let Some(length) = header("content-length").and_then(|length| length.parse::<usize>().ok()) {
            said = said.get(length..).unwrap_or_default();
        } else if header("transfer-encoding").is_some() {
            let end = said.windows(5).position(|five| five == b"0\r\n\r\n");
            said = end.map_or(&[], |end| &said[end + 5..]);
        } else if !status.starts_with('1') {
            said = &[];
        }
        statuses.push(status);
    }
    if statuses.is_empty() { "nothing".to_owned() } else { statuses.join(" ") }
}

/// What all three do, to read.
fn table(cases: &[Case], outcomes: &[&BTreeMap<&str, String>; 3]) -> String {
    let mut text = String::from(
        "# Malformed and ambiguous requests: Tidegate, nginx and HAProxy\n\n\
         Written by `tests/http_differential.rs`, which holds the bytes of each case and fails when one of the three does otherwise than stands here.\n\
         Each case is followed by `GET /next` on the same connection. First the statuses that the client gets; `closed`: `GET /next` was not served;\n\
         after the semicolon what the origin was asked for as a whole request, with the host, unusual headers and the body. All three have their\n\
         defaults but for time limits (nginx: `proxy_set_header Host $host`; Tidegate: `preserve_host`).\n\n",
    );
    text += "| Case | Tidegate | nginx | HAProxy |\n|---|---|---|---|\n";
    for case in cases {
        let cells = outcomes.map(|outcomes| outcomes[case.name].replace('|', "\\|"));
        let same = |cell: &String| if *cell == cells[0] { "the same".to_owned() } else { cell.clone() };
        writeln!(text, "| {} | {} | {} | {} |", case.name, cells[0], same(&cells[1]), same(&cells[2])).unwrap();
    }
    text += "\n## Why they differ\n";
    for (peer, why, names) in EXPLAINED {
        write!(text, "\n{peer:?}: {why}. In: {}.\n", names.join("; ")).unwrap();
    }
    text
}

/// The corpus: how it is framed, chunks, header lines, host, target, request line, what ends at a hop, ends and sizes.
fn cases() -> Vec<Case> {
    let raw: &[(&str, &[u8], &str)] = &[
        ("plain", b"GET /open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /open @g"),
        ("body with a length", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 3\r\n\r\nabc", "200 200; POST /open @g \"abc\""),
        ("body in chunks", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("get with a body", b"GET /open HTTP/1.1\r\nHost: g\r\nContent-Length: 3\r\n\r\nabc", "200 200; GET /open @g \"abc\""),
        ("length and chunked", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", "400 closed"),
        ("chunked and length", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG", "400 closed"),
        ("length and chunked in HTTP/1.0", b"POST /open HTTP/1.0\r\nHost: g\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("two lengths that differ", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\nContent-Length: 3\r\n\r\nabc", "400 closed"),
        ("one length twice", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "400 closed"),
        ("list of one length", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 3, 3\r\n\r\nabc", "400 closed"),
        ("list of lengths", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0, 3\r\n\r\nabc", "400 closed"),
        ("length with a plus", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: +3\r\n\r\nabc", "400 closed"),
        ("length with a minus", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: -3\r\n\r\nabc", "400 closed"),
        ("length in hex", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 0x3\r\n\r\nabc", "400 closed"),
        ("length with a zero before", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 03\r\n\r\nabc", "200 200; POST /open @g \"abc\""),
        ("empty length", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length:\r\n\r\n", "400 closed"),
        ("length of letters", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: abc\r\n\r\nabc", "400 closed"),
        ("length beyond 64 bits", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 18446744073709551619\r\n\r\nabc", "400 closed"),
        ("length with a fraction", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 3.0\r\n\r\nabc", "400 closed"),
        ("length with a space before the colon", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length : 3\r\n\r\nabc", "400 closed"),
        ("length in quotes", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: \"3\"\r\n\r\nabc", "400 closed"),
        ("length with a space inside", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 3 0\r\n\r\nabc", "400 closed"),
        ("length with an underscore", b"POST /open HTTP/1.1\r\nHost: g\r\nContent_Length: 3\r\n\r\n", "200 200; POST /open @g"),
        ("coding unknown", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("coding before chunked", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("coding after chunked", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", "400 closed"),
        ("identity", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity\r\n\r\n", "400 closed"),
        ("identity and length", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc", "400 closed"),
        ("chunked twice", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked twice in a list", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked and identity in two lines", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked in capitals", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("chunked with a tab", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding:\tchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("chunked with a vertical tab", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked in quotes", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked with a parameter", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", "400 closed"),
        ("empty coding", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding:\r\n\r\n", "400 closed"),
        ("empty element before chunked", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: , chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked with a space before the colon", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked folded", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("chunked in HTTP/1.0", b"POST /open HTTP/1.0\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 closed"),
        ("underscore for chunked", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer_Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", "200 200; POST /open @g \"abc\""),
        ("chunked in a get", b"GET /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "200 200; GET /open @g"),
        ("chunk size with 0x", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with a plus", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with a minus", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with a space before", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n 3\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with a space behind", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with a tab behind", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\t\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with zeros before", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0003\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("chunk size with many zeros before", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n00000000000000000000003\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size beyond 64 bits", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size of nothing", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size of letters", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size with an underscore", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n1_0\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk with an extension", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("chunk with an extension in quotes", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3;a=\"b;c\"\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("chunk with a bare line feed in its extension", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3;a\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk with a bare carriage return in its extension", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3;a\rb\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk longer than it says", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk shorter than it says", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk size that ends in a bare line feed", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", "400 closed"),
        ("chunk that ends in a bare line feed", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n", "400 closed"),
        ("chunk that ends in nothing", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc0\r\n\r\n", "400 closed"),
        ("last chunk without its line end", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", "400 closed"),
        ("last chunk of two zeros", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n00\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("trailer", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("trailer with a length", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nContent-Length: 50\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("trailer folded", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n 2\r\n\r\n", "400 closed"),
        ("trailer without a colon", b"POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum\r\n\r\n", "400 closed"),
        ("folded header", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\r\n 2\r\n\r\n", "400 closed"),
        ("folded with a tab", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\r\n\t2\r\n\r\n", "400 closed"),
        ("folded first header", b"GET /open HTTP/1.1\r\n Host: g\r\n\r\n", "400 closed"),
        ("space before the first header", b"GET /open HTTP/1.1\r\n X-A: 1\r\nHost: g\r\n\r\n", "400 closed"),
        ("bare line feeds", b"GET /open HTTP/1.1\nHost: g\n\n", "400 closed"),
        ("bare line feed after the request line", b"GET /open HTTP/1.1\nHost: g\r\n\r\n", "400 closed"),
        ("bare line feed after a header", b"GET /open HTTP/1.1\r\nHost: g\nX-A: 1\r\n\r\n", "400 closed"),
        ("bare line feed as the end of the head", b"GET /open HTTP/1.1\r\nHost: g\r\n\n", "400 closed"),
        ("bare carriage return in a value", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\rX-B: 2\r\n\r\n", "400 closed"),
        ("bare carriage return in the request line", b"GET /open\r HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("two carriage returns", b"GET /open HTTP/1.1\r\r\nHost: g\r\n\r\n", "400 closed"),
        ("NUL in a value", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\x002\r\n\r\n", "400 closed"),
        ("NUL in a name", b"GET /open HTTP/1.1\r\nHost: g\r\nX\0A: 1\r\n\r\n", "400 closed"),
        ("NUL in the target", b"GET /op\0en HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("control character in a value", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\x012\r\n\r\n", "400 closed"),
        ("delete in a value", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\x7f2\r\n\r\n", "400 closed"),
        ("letters beyond ASCII in a value", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: 1\xff2\r\n\r\n", "200 200; GET /open @g, x-a: 1\\xff2"),
        ("letters beyond ASCII in a name", b"GET /open HTTP/1.1\r\nHost: g\r\nX\xffA: 1\r\n\r\n", "400 closed"),
        ("space before the colon", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A : 1\r\n\r\n", "400 closed"),
        ("tab before the colon", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A\t: 1\r\n\r\n", "400 closed"),
        ("space in a name", b"GET /open HTTP/1.1\r\nHost: g\r\nX A: 1\r\n\r\n", "400 closed"),
        ("header without a name", b"GET /open HTTP/1.1\r\nHost: g\r\n: 1\r\n\r\n", "400 closed"),
        ("header without a colon", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A\r\n\r\n", "400 closed"),
        ("header of nothing", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A:\r\n\r\n", "200 200; GET /open @g, x-a: "),
        ("parenthesis in a name", b"GET /open HTTP/1.1\r\nHost: g\r\nX(A): 1\r\n\r\n", "400 closed"),
        ("slash in a name", b"GET /open HTTP/1.1\r\nHost: g\r\nX/A: 1\r\n\r\n", "400 closed"),
        ("underscore in a name", b"GET /open HTTP/1.1\r\nHost: g\r\nX_A: 1\r\n\r\n", "200 200; GET /open @g, x_a: 1"),
        ("space around a value", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: \t 1 \t \r\n\r\n", "200 200; GET /open @g, x-a: 1"),
        ("no host", b"GET /open HTTP/1.1\r\n\r\n", "400 200"),
        ("no host in HTTP/1.0", b"GET /open HTTP/1.0\r\n\r\n", "200 closed; GET /open @itself"),
        ("HTTP/1.0", b"GET /open HTTP/1.0\r\nHost: g\r\n\r\n", "200 closed; GET /open @g"),
        ("HTTP/1.0 with keep-alive", b"GET /open HTTP/1.0\r\nHost: g\r\nConnection: keep-alive\r\n\r\n", "200 200; GET /open @g"),
        ("empty host", b"GET /open HTTP/1.1\r\nHost:\r\n\r\n", "200 200; GET /open @"),
        ("host twice", b"GET /open HTTP/1.1\r\nHost: g\r\nHost: g\r\n\r\n", "400 200"),
        ("two hosts", b"GET /open HTTP/1.1\r\nHost: g\r\nHost: h\r\n\r\n", "400 200"),
        ("host with a path", b"GET /open HTTP/1.1\r\nHost: g/x\r\n\r\n", "400 200"),
        ("host with a user", b"GET /open HTTP/1.1\r\nHost: u@g\r\n\r\n", "400 200"),
        ("host with a space", b"GET /open HTTP/1.1\r\nHost: g h\r\n\r\n", "400 200"),
        ("list of hosts", b"GET /open HTTP/1.1\r\nHost: g, h\r\n\r\n", "400 200"),
        ("host with a port", b"GET /open HTTP/1.1\r\nHost: g:80\r\n\r\n", "200 200; GET /open @g:80"),
        ("host with a port of letters", b"GET /open HTTP/1.1\r\nHost: g:x\r\n\r\n", "400 200"),
        ("host in capitals", b"GET /open HTTP/1.1\r\nHost: G\r\n\r\n", "200 200; GET /open @G"),
        ("host with a dot behind", b"GET /open HTTP/1.1\r\nHost: g.\r\n\r\n", "200 200; GET /open @g."),
        ("host with a question mark", b"GET /open HTTP/1.1\r\nHost: g?x\r\n\r\n", "400 200"),
        ("host with a backslash", b"GET /open HTTP/1.1\r\nHost: g\\x\r\n\r\n", "400 200"),
        ("host of IPv6", b"GET /open HTTP/1.1\r\nHost: [::1]\r\n\r\n", "200 200; GET /open @[::1]"),
        ("host of IPv6 without brackets", b"GET /open HTTP/1.1\r\nHost: ::1\r\n\r\n", "400 200"),
        ("absolute-form", b"GET http://g/open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /open @g"),
        ("absolute-form and another host", b"GET http://h/open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /open @h"),
        ("absolute-form without a host", b"GET http://h/open HTTP/1.1\r\n\r\n", "400 200"),
        ("absolute-form with a user", b"GET http://u@g/open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("absolute-form of https", b"GET https://g/open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /open @g"),
        ("absolute-form of another scheme", b"GET ftp://g/open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("absolute-form without a path", b"GET http://g HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET / @g"),
        ("absolute-form with a query alone", b"GET http://g?x=1 HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /?x=1 @g"),
        ("authority-form", b"GET g:80 HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("asterisk", b"GET * HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("asterisk of options", b"OPTIONS * HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("connect", b"CONNECT g:80 HTTP/1.1\r\nHost: g\r\n\r\n", "501 200"),
        ("target without a slash", b"GET open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("two slashes", b"GET //open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("dot segments", b"GET /a/../open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("dot segments above the root", b"GET /../open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("dot segments encoded", b"GET /a/%2e%2e/open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("dot segments half encoded", b"GET /a/.%2E/open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("dot segments with a parameter", b"GET /a/..;x/open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /a/..;x/open @g"),
        ("slash encoded", b"GET /a%2fopen HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("backslash", b"GET /a\\open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("backslash encoded", b"GET /a%5copen HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("NUL encoded", b"GET /open%00 HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("line feed encoded", b"GET /open%0aX HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("encoding cut off", b"GET /open%2 HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("encoding of no hex", b"GET /open%zz HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("encoding twice", b"GET /%252e%252e/open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /%252e%252e/open @g"),
        ("letter encoded needlessly", b"GET /%6fpen HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /%6fpen @g"),
        ("overlong UTF-8", b"GET /%c0%ae%c0%ae/open HTTP/1.1\r\nHost: g\r\n\r\n", "400 200"),
        ("fragment", b"GET /open#x HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("query of odd characters", b"GET /open?a={b}|c^d`e HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /open?a={b}|c^d`e @g"),
        ("query with a quote", b"GET /open?a=\"b\" HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("braces in the path", b"GET /{open} HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /{open} @g"),
        ("letters beyond ASCII in the target", b"GET /\xc3\xa9 HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; GET /\\xc3\\xa9 @g"),
        ("control character in the target", b"GET /op\x01en HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("delete in the target", b"GET /op\x7fen HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("space in the target", b"GET /open x HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("tab in the target", b"GET /open\tx HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("two spaces after the method", b"GET  /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("two spaces before the version", b"GET /open  HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("space behind the version", b"GET /open HTTP/1.1 \r\nHost: g\r\n\r\n", "400 closed"),
        ("space before the method", b" GET /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("tab for a space", b"GET\t/open\tHTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("empty line before", b"\r\nGET /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("many empty lines before", b"\r\n\r\n\r\n\r\n\r\n\r\nGET /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("bare line feed before", b"\nGET /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("HTTP/0.9", b"GET /open\r\n", "400 closed"),
        ("no version", b"GET /open\r\nHost: g\r\n\r\n", "400 closed"),
        ("HTTP/2.0", b"GET /open HTTP/2.0\r\nHost: g\r\n\r\n", "400 closed"),
        ("HTTP/3.0", b"GET /open HTTP/3.0\r\nHost: g\r\n\r\n", "400 closed"),
        ("HTTP/1.2", b"GET /open HTTP/1.2\r\nHost: g\r\n\r\n", "400 closed"),
        ("HTTP/1", b"GET /open HTTP/1\r\nHost: g\r\n\r\n", "400 closed"),
        ("HTTP/1.10", b"GET /open HTTP/1.10\r\nHost: g\r\n\r\n", "400 closed"),
        ("HTTP/01.1", b"GET /open HTTP/01.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("lower-case version", b"GET /open http/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("ICY for HTTP", b"GET /open ICY/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("method in small letters", b"get /open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; get /open @g"),
        ("method of our own", b"BREW /open HTTP/1.1\r\nHost: g\r\n\r\n", "200 200; BREW /open @g"),
        ("method with a character it may not have", b"G(T /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("method of nothing", b" /open HTTP/1.1\r\nHost: g\r\n\r\n", "nothing closed"),
        ("TRACE", b"TRACE /open HTTP/1.1\r\nHost: g\r\n\r\n", "501 200"),
        ("PRI", b"PRI * HTTP/2.0\r\nHost: g\r\n\r\n", "nothing closed"),
        ("connection names a header", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: X-A\r\nX-A: 1\r\nX-B: 2\r\n\r\n", "200 200; GET /open @g, x-b: 2"),
        ("connection names host", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: Host\r\n\r\n", "200 200; GET /open @g"),
        ("connection names content-length", b"POST /open HTTP/1.1\r\nHost: g\r\nConnection: Content-Length\r\nContent-Length: 3\r\n\r\nabc", "200 200; POST /open @g \"abc\""),
        ("connection names transfer-encoding", b"POST /open HTTP/1.1\r\nHost: g\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "200 200; POST /open @g \"abc\""),
        ("connection names x-forwarded-for", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: X-Forwarded-For\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n", "200 200; GET /open @g"),
        ("connection names authorization", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: Authorization\r\nAuthorization: Basic eDp5\r\n\r\n", "200 200; GET /open @g, authorization: Basic eDp5"),
        ("connection of bad characters", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: a b(c\r\n\r\n", "200 200; GET /open @g"),
        ("keep-alive", b"GET /open HTTP/1.1\r\nHost: g\r\nKeep-Alive: timeout=5\r\nConnection: Keep-Alive\r\n\r\n", "200 200; GET /open @g"),
        ("proxy-connection", b"GET /open HTTP/1.1\r\nHost: g\r\nProxy-Connection: keep-alive\r\n\r\n", "200 200; GET /open @g"),
        ("te", b"GET /open HTTP/1.1\r\nHost: g\r\nTE: trailers\r\nConnection: TE\r\n\r\n", "200 200; GET /open @g, te: trailers"),
        ("te of gzip", b"GET /open HTTP/1.1\r\nHost: g\r\nTE: gzip\r\nConnection: TE\r\n\r\n", "200 200; GET /open @g"),
        ("trailer announced", b"GET /open HTTP/1.1\r\nHost: g\r\nTrailer: X-Sum\r\n\r\n", "200 200; GET /open @g, trailer: X-Sum"),
        ("proxy-authorization", b"GET /open HTTP/1.1\r\nHost: g\r\nProxy-Authorization: Basic eDp5\r\n\r\n", "200 200; GET /open @g"),
        ("h2c upgrade", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", "200 200; GET /open @g"),
        ("upgrade to another protocol", b"GET /open HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", "200 200; GET /open @g, upgrade: echo, connection: upgrade"),
        ("upgrade without connection", b"GET /open HTTP/1.1\r\nHost: g\r\nUpgrade: echo\r\n\r\n", "200 200; GET /open @g"),
        ("upgrade in HTTP/1.0", b"GET /open HTTP/1.0\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", "200 closed; GET /open @g"),
        ("upgrade with a body", b"POST /open HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: echo\r\nContent-Length: 3\r\n\r\nabc", "200 200; POST /open @g, upgrade: echo, connection: upgrade \"abc\""),
        ("expect 100-continue", b"POST /open HTTP/1.1\r\nHost: g\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", "100 200 200; POST /open @g \"abc\""),
        ("expect without a body", b"GET /open HTTP/1.1\r\nHost: g\r\nExpect: 100-continue\r\n\r\n", "200 200; GET /open @g"),
        ("expect something else", b"POST /open HTTP/1.1\r\nHost: g\r\nExpect: 200-ok\r\nContent-Length: 3\r\n\r\nabc", "200 200; POST /open @g \"abc\""),
        ("expect 100-continue in HTTP/1.0", b"POST /open HTTP/1.0\r\nHost: g\r\nExpect: 100-continue\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc", "200 200; POST /open @g \"abc\""),
        ("authorization twice", b"GET /open HTTP/1.1\r\nHost: g\r\nAuthorization: Basic eDp5\r\nAuthorization: Basic eDp6\r\n\r\n", "200 200; GET /open @g, authorization: Basic eDp5, authorization: Basic eDp6"),
        ("range of many", b"GET /open HTTP/1.1\r\nHost: g\r\nRange: bytes=0-,0-,0-,0-\r\n\r\n", "200 200; GET /open @g, range: bytes=0-,0-,0-,0-"),
        ("body shorter than it says", b"POST /open HTTP/1.1\r\nHost: g\r\nContent-Length: 500\r\n\r\nabc", "408 closed"),
        ("head without an end", b"GET /open HTTP/1.1\r\nHost: g\r\nX-A: ", "400 closed"),
        ("GARBAGE before", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n", "nothing closed"),
        ("request after an error", b"GET /open HTTP/1.1\r\nHost: g\r\nBad Header: 1\r\n\r\nGET /second HTTP/1.1\r\nHost: g\r\n\r\n", "400 closed"),
        ("two requests and then an error", b"GET /open HTTP/1.1\r\nHost: g\r\n\r\nGET /second HTTP/1.1\r\nHost: g\r\n\r\nGET /third HTTP/1.1\r\nHost : g\r\n\r\n", "200 200 400 closed; GET /open @g; GET /second @g"),
    ];
    let sized: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "target of 7 KiB",
            format!("GET /{} HTTP/1.1\r\nHost: g\r\n\r\n", "x".repeat(7 << 10)).into(),
            "200 200; (7173 bytes) @g",
        ),
        ("target of 20 KiB", format!("GET /{} HTTP/1.1\r\nHost: g\r\n\r\n", "x".repeat(20 << 10)).into(), "431 closed"),
        (
            "header of 7 KiB",
            format!("GET /open HTTP/1.1\r\nHost: g\r\nX-A: {}\r\n\r\n", "x".repeat(7 << 10)).into(),
            "200 200; GET /open @g, x-a: (7168 bytes)",
        ),
        (
            "header of 20 KiB",
            format!("GET /open HTTP/1.1\r\nHost: g\r\nX-A: {}\r\n\r\n", "x".repeat(20 << 10)).into(),
            "431 closed",
        ),
        (
            "name of 7 KiB",
            format!("GET /open HTTP/1.1\r\nHost: g\r\n{}: 1\r\n\r\n", "x".repeat(7 << 10)).into(),
            "200 200; GET /open @g, (7168 bytes): 1",
        ),
        (
            "300 headers",
            format!("GET /open HTTP/1.1\r\nHost: g\r\n{}\r\n", "X: 1\r\n".repeat(300)).into(),
            "431 closed",
        ),
        (
            "method of 300 letters",
            format!("{} /open HTTP/1.1\r\nHost: g\r\n\r\n", "X".repeat(300)).into(),
            "nothing closed",
        ),
        (
            "chunk extension of 2 KiB",
            format!(
                "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3;{}\r\nabc\r\n0\r\n\r\n",
                "x".repeat(2 << 10)
            )
            .into(),
            "400 closed",
        ),
        (
            "trailer of 20 KiB",
            format!(
                "POST /open HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: {}\r\n\r\n",
                "x".repeat(20 << 10)
            )
            .into(),
            "400 closed",
        ),
    ];
    let raw = raw.iter().map(|(name, bytes, ours)| Case { name, bytes: bytes.to_vec(), ours });
    raw.chain(sized.into_iter().map(|(name, bytes, ours)| Case { name, bytes, ours })).collect()
}
