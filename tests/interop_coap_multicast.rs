//! Multicast discovery (RFC 7252 section 8) on an interface of its own, in a network namespace that the test makes.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::process::Command;

use support::{Gateway, PATIENCE, Wanted, program, said, stdout};

/// A link between two ends that are both ours: what is sent to a group on one comes back to who has joined it there.
const NAMESPACE: &str = "\
ip link set lo up &&
sysctl -qw net.ipv6.conf.default.accept_dad=0 &&
ip link add tide0 type veth peer name tide1 &&
ip address add 10.83.0.1/24 dev tide0 &&
ip link set tide0 up && ip link set tide1 up &&
ip route add 224.0.0.0/4 dev tide0";

const INSIDE: &str = "TIDEGATE_TEST_INSIDE";

/// Runs the test of this name again in a namespace; true when that was done, false when this is it. Where the kernel grants none, it says so and passes.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let granted = Command::new("unshare").args(["--net", "sh", "-c", NAMESPACE]).output();
    match granted {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            eprintln!("SKIPPED {test}: no network namespace with an interface here: {}", said(&output));
            return true;
        }
        Err(error) => {
            eprintln!("SKIPPED {test}: no unshare here: {error}");
            return true;
        }
    }
    let program = std::env::current_exe().unwrap();
    let script = format!("{NAMESPACE} && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", &script, "sh"]).arg(program).args(["--exact", test, "--nocapture"]);
    let output = command.env(INSIDE, "1").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    true
}

fn gateway() -> Gateway {
    let listener = |name: &str, bind: &str| {
        format!(
            "\n[[listener]]\nname = \"{name}\"\nbind = \"{bind}\"\ntransport = \"udp\"\nallow_public = true\n\
             multicast_interfaces = [\"tide0\"]\n"
        )
    };
    let extra = listener("all4", "0.0.0.0:5683") + &listener("all6", "[::]:5683");
    Gateway::start(&Wanted { extra, ..Wanted::default() })
}

/// A GET with token `tk` of a path and a query of less than 13 bytes each.
fn get(kind: u8, path: &[&str], query: &str) -> Vec<u8> {
    let mut datagram = vec![0x42 | kind << 4, 1, 0x12, 0x34, b't', b'k'];
    let mut delta = 11;
    for segment in path {
        datagram.push(delta << 4 | u8::try_from(segment.len()).unwrap());
        datagram.extend(segment.bytes());
        delta = 0;
    }
    if !query.is_empty() {
        datagram.push(4 << 4 | u8::try_from(query.len()).unwrap());
        datagram.extend(query.bytes());
    }
    datagram
}

const NON: u8 = 1;
const CORE: [&str; 2] = [".well-known", "core"];

fn interface_index() -> u32 {
    // Not from /sys, which shows the namespace that it was mounted in.
    let output = program("Debian package iproute2", &["ip", "-o", "link", "show", "tide0"]);
    stdout(&output).split(':').next().unwrap().parse().unwrap()
}

#[test]
fn a_group_is_answered_from_an_address_of_ours_and_only_where_it_should() {
    if in_namespace("a_group_is_answered_from_an_address_of_ours_and_only_where_it_should") {
        return;
    }
    let _gateway = gateway();
    let index = interface_index();
    let link = SocketAddr::V6(SocketAddrV6::new("ff02::fd".parse().unwrap(), 5683, 0, index));
    let site = SocketAddr::V6(SocketAddrV6::new("ff05::fd".parse().unwrap(), 5683, 0, index));
    let v4: SocketAddr = "224.0.1.187:5683".parse().unwrap();
    let bind4 = || UdpSocket::bind("10.83.0.1:0").unwrap();
    let bind6 = || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();

    let silent = bind4();
    for unanswered in [
        get(0, &CORE, ""),
        get(NON, &["t"], ""),
        get(NON, &["nothing"], ""),
        get(NON, &CORE, "rt=none"),
        get(NON, &CORE, "t=token"),
        b"\x40\x00\x00\x01".to_vec(),
        b"\x40\x01\x00\x02\xff".to_vec(),
    ] {
        silent.send_to(&unanswered, v4).unwrap();
    }
    for (socket, group) in [(bind4(), v4), (bind6(), link), (bind6(), site)] {
        let asked = get(NON, &CORE, "rt=tidegate*");
        // Twice: the second is a duplicate.
        socket.send_to(&asked, group).unwrap();
        socket.send_to(&asked, group).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = [0; 500];
        let (length, from) = socket.recv_from(&mut answer).unwrap();
        let answer = &answer[..length];
        assert!(!from.ip().is_multicast() && from.port() == 5683, "{from}");
        assert_eq!((answer[0], answer[1], &answer[4..6]), (0x52, 0x45, &b"tk"[..]), "NON 2.05 with the token");
        assert!(String::from_utf8_lossy(answer).contains("</auth/c>") && length <= 136, "{answer:02x?}");
        // Going on by unicast, where it came from.
        let ping = b"\x40\x00\xab\xcd";
        socket.send_to(ping, from).unwrap();
        let mut reset = [0; 500];
        let (length, _) = socket.recv_from(&mut reset).unwrap();
        assert_eq!(&reset[..length], b"\x70\x00\xab\xcd", "one answer, and then the pong");
    }
    silent.set_nonblocking(true).unwrap();
    let said = silent.recv_from(&mut [0; 500]);
    assert!(said.is_err(), "{said:?}");
}

#[test]
fn libcoap_discovers_the_gateway() {
    if in_namespace("libcoap_discovers_the_gateway") {
        return;
    }
    let _gateway = gateway();
    for group in ["224.0.1.187", "[ff02::fd%tide0]"] {
        let url = format!("coap://{group}/.well-known/core");
        let words = ["coap-client-notls", "-N", "-m", "get", "-B", "7", &url];
        let output = program("Debian package libcoap3-bin", &words);
        assert!(stdout(&output).contains("</auth/c>"), "{url}: {}", said(&output));
    }
}
