//! Worker threads and the sockets they share.
//!
//! Each worker is one thread with one current-thread runtime and its own `SO_REUSEPORT` socket for every listener, so the kernel spreads
//! connections and datagrams over the workers and nothing is handed from thread to thread. Tasks are spawned with plain `tokio::spawn`
//! and are therefore `Send`: a `LocalSet` would add a second run queue to every wake-up and tie the adapters to it, and would save only
//! uncontended atomics. A further runtime, "control", holds what is off the request path.
//!
//! Promises: all sockets are bound before any is served ([`bind`] comes first and fails as a whole), a port that somebody else
//! listens on is an error even when that somebody used `SO_REUSEPORT` too, and a worker whose thread dies is noticed ([`Workers::join`]).

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tokio_util::sync::CancellationToken;

use crate::tasks::Tasks;

/// Pending connections per socket; the kernel lowers it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// What kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Tcp,
    Udp,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Tcp => "tcp",
            Kind::Udp => "udp",
        })
    }
}

/// Why nothing was started.
#[derive(Debug)]
pub enum Error {
    /// Somebody listens there already. Another try may succeed when it is gone.
    PortTaken { kind: Kind, address: SocketAddr },
    /// A port below 1024 without the right to it.
    NotAllowed { kind: Kind, address: SocketAddr },
    /// No interface has this address.
    NoSuchAddress { kind: Kind, address: SocketAddr },
    /// There is no network interface of this name.
    NoSuchInterface { interface: String },
    /// Anything else the system said.
    Socket { kind: Kind, address: SocketAddr, source: io::Error },
    /// A thread or its runtime could not be made.
    Thread { name: String, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::PortTaken { kind, address } => write!(f, "{kind} {address} is in use by another process"),
            Error::NotAllowed { kind, address } => {
                write!(f, "no permission to listen on {kind} {address}; ports below 1024 need CAP_NET_BIND_SERVICE")
            }
            Error::NoSuchAddress { kind, address } => {
                write!(f, "cannot listen on {kind} {address}: no interface has this address")
            }
            Error::NoSuchInterface { interface } => write!(f, "there is no network interface {interface}"),
            Error::Socket { kind, address, source } => write!(f, "cannot listen on {kind} {address}: {source}"),
            Error::Thread { name, source } => write!(f, "cannot start thread {name}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Socket { source, .. } | Error::Thread { source, .. } => Some(source),
            Error::PortTaken { .. }
            | Error::NotAllowed { .. }
            | Error::NoSuchAddress { .. }
            | Error::NoSuchInterface { .. } => None,
        }
    }
}

impl Error {
    fn from_io(kind: Kind, address: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Error::PortTaken { kind, address },
            io::ErrorKind::PermissionDenied => Error::NotAllowed { kind, address },
            io::ErrorKind::AddrNotAvailable => Error::NoSuchAddress { kind, address },
            _ => Error::Socket { kind, address, source },
        }
    }
}

/// TCP sockets on `address`, one for each of `copies` workers, listening and non-blocking, with the address they have (port 0 is resolved).
///
/// # Errors
/// See [`Error`]; nothing stays bound.
pub fn bind_tcp(address: SocketAddr, copies: usize) -> Result<(SocketAddr, Vec<TcpListener>), Error> {
    let (bound, sockets) = bind(Kind::Tcp, address, copies)?;
    for socket in &sockets {
        socket.listen(BACKLOG).map_err(|source| Error::from_io(Kind::Tcp, bound, source))?;
    }
    Ok((bound, sockets.into_iter().map(TcpListener::from).collect()))
}

/// As [`bind_tcp`], for datagrams.
///
/// # Errors
/// See [`Error`]; nothing stays bound.
pub fn bind_udp(address: SocketAddr, copies: usize) -> Result<(SocketAddr, Vec<UdpSocket>), Error> {
    let (bound, sockets) = bind(Kind::Udp, address, copies)?;
    Ok((bound, sockets.into_iter().map(UdpSocket::from).collect()))
}

/// A socket that receives what comes in on one interface for `group`, and nothing else. What it sends comes from an address of ours that routing chooses.
///
/// # Errors
/// See [`Error`].
pub fn bind_group(group: IpAddr, port: u16, interface: &str) -> Result<UdpSocket, Error> {
    let index = if_nametoindex(interface).map_err(|_| Error::NoSuchInterface { interface: interface.to_owned() })?;
    // A group of link-local scope is one of each link.
    let address = match group {
        IpAddr::V4(group) => SocketAddr::V4(SocketAddrV4::new(group, port)),
        IpAddr::V6(group) => SocketAddr::V6(SocketAddrV6::new(group, port, 0, index)),
    };
    let failed = |source| Error::from_io(Kind::Udp, address, source);
    let socket = socket(Kind::Udp, address).map_err(failed)?;
    // Beside the listener on every address, and the same group on another interface.
    socket.set_reuse_port(true).map_err(failed)?;
    socket.bind(&address.into()).map_err(failed)?;
    match group {
        IpAddr::V4(group) => socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index)),
        IpAddr::V6(group) => socket.join_multicast_v6(&group, index),
    }
    .map_err(failed)?;
    Ok(UdpSocket::from(socket))
}

/// The first socket is bound without `SO_REUSEPORT`, so that a foreign listener with it is found, and gets it afterwards, so that the
/// others may join.
fn bind(kind: Kind, address: SocketAddr, copies: usize) -> Result<(SocketAddr, Vec<Socket>), Error> {
    let failed = |source| Error::from_io(kind, address, source);
    let first = socket(kind, address).map_err(failed)?;
    first.bind(&address.into()).map_err(failed)?;
    let bound = first.local_addr().map_err(failed)?.as_socket().unwrap_or(address);
    // On every address, it shares the port with the sockets of multicast groups.
    if copies > 1 || (kind == Kind::Udp && address.ip().is_unspecified()) {
        first.set_reuse_port(true).map_err(failed)?;
    }
    let mut sockets = vec![first];
    for _ in 1..copies {
        let further = socket(kind, bound).map_err(failed)?;
        further.set_reuse_port(true).map_err(failed)?;
        further.bind(&bound.into()).map_err(failed)?;
        sockets.push(further);
    }
    Ok((bound, sockets))
}

fn socket(kind: Kind, address: SocketAddr) -> io::Result<Socket> {
    let (r#type, protocol) = match kind {
        Kind::Tcp => (Type::STREAM, Protocol::TCP),
        Kind::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(address), r#type, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if kind == Kind::Tcp {
        // Connections of the last run in TIME_WAIT do not keep us from our port. For UDP it would mean sharing the port.
        socket.set_reuse_address(true)?;
    }
    if address.is_ipv6() {
        // `[::]` and `0.0.0.0` are two listeners, so that each is what it says.
        socket.set_only_v6(true)?;
    }
    if kind == Kind::Udp {
        // Groups that other programs of this machine have joined are none of ours. What a kernel does not know (IPv6: before Linux 4.20) it does not do either way.
        let all_groups = match address {
            SocketAddr::V4(_) => socket.set_multicast_all_v4(false),
            SocketAddr::V6(_) => socket.set_multicast_all_v6(false),
        };
        all_groups
            .or_else(|error| if error.raw_os_error() == Some(nix::libc::ENOPROTOOPT) { Ok(()) } else { Err(error) })?;
        if address.ip().is_unspecified() {
            // Datagrams say which of our addresses they came to.
            match address {
                SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
                SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
            }
        }
    }
    Ok(socket)
}

/// What one worker is given.
#[derive(Clone, Debug)]
pub struct Worker {
    /// 0 to N-1; the thread is called `worker-INDEX`.
    pub index: usize,
    /// Where it spawns; ends with the workers' shutdown token.
    pub tasks: Tasks,
}

/// The running workers.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
    shutdown: CancellationToken,
}

/// A worker's thread ended by a panic; its log says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerDied;

impl fmt::Display for WorkerDied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a worker thread died")
    }
}

impl std::error::Error for WorkerDied {}

/// Starts `count` workers; each runs `serve` to its end and then drops its runtime with every task still there.
///
/// When one ends, by return or by panic, `shutdown` is cancelled: the gateway never runs on with half its workers.
///
/// # Errors
/// [`Error::Thread`]; workers already started are told to end.
pub fn start<F, Fut>(count: usize, shutdown: CancellationToken, serve: F) -> Result<Workers, Error>
where
    F: Fn(Worker) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()>,
{
    let serve = Arc::new(serve);
    let mut workers = Workers { threads: Vec::with_capacity(count), shutdown: shutdown.clone() };
    for index in 0..count {
        let serve = serve.clone();
        let tasks = Tasks::new(shutdown.child_token());
        let ended = shutdown.clone();
        match spawn(format!("worker-{index}"), ended, move || serve(Worker { index, tasks })) {
            Ok(thread) => workers.threads.push(thread),
            Err(error) => {
                shutdown.cancel();
                return Err(error);
            }
        }
    }
    Ok(workers)
}

/// Starts one thread, `control`, with a runtime of its own that runs `main` to its end.
///
/// # Errors
/// [`Error::Thread`].
pub fn start_control<F, Fut>(shutdown: CancellationToken, main: F) -> Result<Workers, Error>
where
    F: FnOnce(Tasks) -> Fut + Send + 'static,
    Fut: Future<Output = ()>,
{
    let tasks = Tasks::new(shutdown.child_token());
    let thread = spawn("control".to_owned(), shutdown.clone(), move || main(tasks))?;
    Ok(Workers { threads: vec![thread], shutdown })
}

impl Workers {
    /// Waits for every thread; blocks.
    ///
    /// # Errors
    /// [`WorkerDied`] if one panicked.
    pub fn join(self) -> Result<(), WorkerDied> {
        let mut outcome = Ok(());
        for thread in self.threads {
            if thread.join().is_err() {
                outcome = Err(WorkerDied);
            }
        }
        outcome
    }

    /// Cancelled when the workers are to end, or when one has ended.
    pub fn shutdown_token(&self) -> &CancellationToken {
        &self.shutdown
    }
}

fn spawn<F, Fut>(name: String, ended: CancellationToken, main: F) -> Result<JoinHandle<()>, Error>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = ()>,
{
    let failed = |source| Error::Thread { name: name.clone(), source };
    // Built here, so that a lack of file descriptors is reported to who starts us.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            // Cancels on return and on panic alike.
            let _ended = ended.drop_guard();
            runtime.block_on(main());
        })
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::Mutex;
    use std::sync::mpsc;

    use super::*;

    fn any_port() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    #[test]
    fn every_worker_gets_a_socket_on_the_same_free_port() {
        let (address, sockets) = bind_tcp(any_port(), 4).unwrap();
        assert_ne!(address.port(), 0);
        assert!(sockets.iter().all(|s| s.local_addr().unwrap() == address));
        let (address, sockets) = bind_udp(any_port(), 4).unwrap();
        assert!(sockets.iter().all(|s| s.local_addr().unwrap() == address));
    }

    #[test]
    fn a_port_that_another_gateway_serves_is_an_error() {
        let (tcp, _listening) = bind_tcp(any_port(), 2).unwrap();
        assert!(matches!(bind_tcp(tcp, 2), Err(Error::PortTaken { kind: Kind::Tcp, address }) if address == tcp));
        assert!(matches!(bind_tcp(tcp, 1), Err(Error::PortTaken { .. })));
        let (udp, _bound) = bind_udp(any_port(), 2).unwrap();
        assert!(matches!(bind_udp(udp, 2), Err(Error::PortTaken { kind: Kind::Udp, .. })));
    }

    #[test]
    fn an_address_that_is_not_ours_is_named() {
        let error = bind_tcp("192.0.2.1:0".parse().unwrap(), 1).unwrap_err();
        assert!(matches!(error, Error::NoSuchAddress { .. }), "{error}");
        assert!(error.to_string().contains("192.0.2.1:0"));
    }

    #[test]
    fn connections_reach_all_workers_and_shutdown_ends_them() {
        let (address, sockets) = bind_tcp(any_port(), 2).unwrap();
        let sockets = Mutex::new(sockets.into_iter().map(Some).collect::<Vec<_>>());
        let shutdown = CancellationToken::new();
        let workers = start(2, shutdown.clone(), move |worker| {
            let socket = sockets.lock().unwrap()[worker.index].take().unwrap();
            async move {
                let listener = tokio::net::TcpListener::from_std(socket).unwrap();
                let name = std::thread::current().name().unwrap().to_owned();
                loop {
                    tokio::select! {
                        () = worker.tasks.shutdown_token().cancelled() => return,
                        accepted = listener.accept() => {
                            let (stream, _) = accepted.unwrap();
                            stream.into_std().unwrap().write_all(name.as_bytes()).unwrap();
                        }
                    }
                }
            }
        })
        .unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let mut name = String::new();
            TcpStream::connect(address).unwrap().read_to_string(&mut name).unwrap();
            seen.insert(name);
            if seen.len() == 2 {
                break;
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["worker-0", "worker-1"]);
        shutdown.cancel();
        assert_eq!(workers.join(), Ok(()));
    }

    #[test]
    fn a_worker_that_dies_takes_the_others_down_and_is_reported() {
        let (tell, told) = mpsc::channel();
        let tell = Mutex::new(tell);
        let workers = start(2, CancellationToken::new(), move |worker| {
            let tell = tell.lock().unwrap().clone();
            async move {
                if worker.index == 1 {
                    panic!("on purpose");
                }
                worker.tasks.shutdown_token().cancelled().await;
                tell.send(()).unwrap();
            }
        })
        .unwrap();
        assert_eq!(workers.join(), Err(WorkerDied));
        assert_eq!(told.try_recv(), Ok(()));
    }
}
