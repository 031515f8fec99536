//! Datagrams in batches: one `recvmmsg` and one `sendmmsg` for many.
//!
//! A socket on every address of the machine answers from the address that was asked (RFC 7252 section 5.3.2): [`Locals`]. On one that is bound to a
//! single address nothing of that happens.
//!
//! The headers of both calls hold raw pointers, so they live in a thread's own storage and not in a future that has to be `Send`; a worker is one thread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, RecvMsg, SockaddrStorage, recvmmsg, sendmmsg,
};
use tidegate_coap::Batch;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Datagrams of one system call.
pub const BATCH_MAX: usize = 32;
/// Room for one datagram: a message with a block of 1024 bytes and all its options is well below (RFC 7252 section 4.6 suggests 1152).
pub const DATAGRAM_BYTES_MAX: usize = 2048;

/// A datagram as it came.
pub struct Datagram<'d> {
    pub peer: SocketAddr,
    pub bytes: &'d [u8],
    /// It was longer than [`DATAGRAM_BYTES_MAX`]; the rest is gone.
    pub truncated: bool,
}

/// What is said of a datagram beside its bytes and its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Info {
    Nothing,
    V4,
    V6,
}

/// The headers of a call in each direction. The room for what is said is of exactly its size: the kernel writes down what it has used of it, and that is
/// what the next call offers.
struct Headers {
    receive: MultiHeaders<SockaddrStorage>,
    send: MultiHeaders<SockaddrStorage>,
}

impl Headers {
    fn new(info: Info) -> Self {
        let room = || match info {
            Info::Nothing => None,
            Info::V4 => Some(nix::cmsg_space!(in_pktinfo)),
            Info::V6 => Some(nix::cmsg_space!(in6_pktinfo)),
        };
        Headers {
            receive: MultiHeaders::preallocate(BATCH_MAX, room()),
            send: MultiHeaders::preallocate(BATCH_MAX, room()),
        }
    }
}

struct Buffers {
    plain: Headers,
    /// Made for the first socket that wants them.
    v4: Option<Headers>,
    v6: Option<Headers>,
    bytes: Box<[u8]>,
    addresses: Vec<Option<SockaddrStorage>>,
}

impl Buffers {
    fn new() -> Self {
        Buffers {
            plain: Headers::new(Info::Nothing),
            v4: None,
            v6: None,
            bytes: vec![0; BATCH_MAX * DATAGRAM_BYTES_MAX].into_boxed_slice(),
            addresses: Vec::with_capacity(BATCH_MAX),
        }
    }
}

fn headers_of<'h>(
    plain: &'h mut Headers,
    v4: &'h mut Option<Headers>,
    v6: &'h mut Option<Headers>,
    info: Info,
) -> &'h mut Headers {
    match info {
        Info::Nothing => plain,
        Info::V4 => v4.get_or_insert_with(|| Headers::new(info)),
        Info::V6 => v6.get_or_insert_with(|| Headers::new(info)),
    }
}

/// From which address of ours each peer is answered.
#[derive(Debug)]
pub struct Locals {
    info: Info,
    /// The address that most are answered from, which costs no memory.
    usual: Option<IpAddr>,
    others: HashMap<SocketAddr, IpAddr>,
    peers_max: usize,
}

impl Locals {
    /// Of this socket, for at most `peers_max` peers that are not answered from the usual address; beyond, all of those are forgotten, and answered from the
    /// usual address until they ask again.
    ///
    /// # Errors
    /// The socket has no address.
    pub fn new(socket: &UdpSocket, peers_max: usize) -> io::Result<Self> {
        let info = match socket.local_addr()?.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Info::V4,
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Info::V6,
            _ => Info::Nothing,
        };
        Ok(Locals { info, usual: None, others: HashMap::new(), peers_max })
    }

    /// Notes where the peer's last datagram came to.
    pub fn note(&mut self, peer: SocketAddr, local: IpAddr) {
        if self.usual.is_none_or(|usual| usual == local) {
            self.usual = Some(local);
            if !self.others.is_empty() {
                self.others.remove(&peer);
            }
            return;
        }
        if self.others.len() >= self.peers_max {
            self.others.clear();
        }
        self.others.insert(peer, local);
    }

    fn of(&self, peer: SocketAddr) -> Option<IpAddr> {
        if self.others.is_empty() { self.usual } else { self.others.get(&peer).copied().or(self.usual) }
    }

    /// Nothing is known any more, because the machine's addresses have changed; what is sent before peers ask again goes as routing has it.
    fn forget(&mut self) {
        self.usual = None;
        self.others.clear();
    }
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers::new());
}

/// Receives what is there, at most [`BATCH_MAX`] datagrams, and shows each. `take` must not receive or send itself.
///
/// # Errors
/// `WouldBlock` when there is nothing; otherwise what the system says, which concerns no single peer.
pub fn receive(socket: &UdpSocket, locals: &mut Locals, mut take: impl FnMut(Datagram<'_>)) -> io::Result<usize> {
    let mut received = 0;
    let outcome = socket.try_io(Interest::READABLE, || {
        received = receive_now(socket.as_raw_fd(), locals, &mut take)?;
        // Fewer than asked for: the socket is empty. Saying so spares the call that would find that out; what arrives from here on wakes us again.
        if received < BATCH_MAX { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match outcome {
        Err(error) if received == 0 => Err(error),
        Ok(()) | Err(_) => Ok(received),
    }
}

fn receive_now(fd: RawFd, locals: &mut Locals, take: &mut impl FnMut(Datagram<'_>)) -> io::Result<usize> {
    BUFFERS.with_borrow_mut(|buffers| {
        let Buffers { plain, v4, v6, bytes, .. } = buffers;
        let headers = headers_of(plain, v4, v6, locals.info);
        let mut rooms = bytes.chunks_exact_mut(DATAGRAM_BYTES_MAX);
        let mut slices: [[IoSliceMut<'_>; 1]; BATCH_MAX] =
            std::array::from_fn(|_| [IoSliceMut::new(rooms.next().unwrap_or_default())]);
        let received = recvmmsg(fd, &mut headers.receive, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None)?;
        let mut count = 0;
        for message in received {
            count += 1;
            let (Some(peer), Some(bytes)) = (message.address.as_ref().and_then(to_std), message.iovs().next()) else {
                continue;
            };
            let truncated = message.flags.contains(MsgFlags::MSG_TRUNC);
            if locals.info != Info::Nothing {
                match came_to(&message) {
                    CameTo::Nobody => {}
                    // A broadcast is for nobody in particular, and its answers would be many.
                    CameTo::All => continue,
                    CameTo::Address(local) => locals.note(peer, local),
                }
            }
            take(Datagram { peer, bytes, truncated });
        }
        Ok(count)
    })
}

/// Sends the datagrams of `batch` from number `from` on and returns how many of the batch are done with. A datagram that the system refuses (an address
/// without a route) is done with too: its loss is CoAP's ordinary business.
///
/// # Errors
/// `WouldBlock` when the socket takes none now.
pub fn send(socket: &UdpSocket, locals: &mut Locals, batch: &Batch, from: usize) -> io::Result<usize> {
    let sent = socket.try_io(Interest::WRITABLE, || match send_now(socket.as_raw_fd(), locals, batch, from) {
        Ok(sent) => Ok(sent),
        Err(Errno::EAGAIN | Errno::ENOBUFS) => Err(io::ErrorKind::WouldBlock.into()),
        Err(error) => {
            tracing::debug!(%error, "datagram not sent");
            // An address of ours that is no longer.
            if matches!(error, Errno::EINVAL | Errno::EADDRNOTAVAIL) {
                locals.forget();
            }
            Ok(1)
        }
    })?;
    Ok(from + sent)
}

/// Those from the front of `batch` that leave from one address: nearly always all, for one call says it for all its datagrams.
fn send_now(fd: RawFd, locals: &Locals, batch: &Batch, from: usize) -> nix::Result<usize> {
    BUFFERS.with_borrow_mut(|buffers| {
        let Buffers { plain, v4, v6, addresses, .. } = buffers;
        let local = batch.get(from).filter(|_| locals.info != Info::Nothing).and_then(|(peer, _)| locals.of(peer));
        let mut slices = [[IoSlice::new(&[])]; BATCH_MAX];
        addresses.clear();
        for (slice, at) in slices.iter_mut().zip(from..batch.len()) {
            let Some((peer, bytes)) = batch.get(at) else { break };
            if local.is_some() && locals.of(peer) != local {
                break;
            }
            *slice = [IoSlice::new(bytes)];
            addresses.push(Some(peer.into()));
        }
        let (from4, from6);
        let from = match local {
            None => &[][..],
            Some(IpAddr::V4(local)) => {
                let s_addr = u32::from_ne_bytes(local.octets());
                from4 =
                    in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: in_addr { s_addr }, ipi_addr: in_addr { s_addr: 0 } };
                &[ControlMessage::Ipv4PacketInfo(&from4)][..]
            }
            Some(IpAddr::V6(local)) => {
                from6 = in6_pktinfo { ipi6_addr: in6_addr { s6_addr: local.octets() }, ipi6_ifindex: 0 };
                &[ControlMessage::Ipv6PacketInfo(&from6)][..]
            }
        };
        let info = if local.is_some() { locals.info } else { Info::Nothing };
        let headers = headers_of(plain, v4, v6, info);
        Ok(sendmmsg(fd, &mut headers.send, &slices, &*addresses, from, MsgFlags::MSG_DONTWAIT)?.count())
    })
}

/// To whom a datagram was sent.
enum CameTo {
    /// The system has not said.
    Nobody,
    /// All on the link.
    All,
    Address(IpAddr),
}

fn came_to(message: &RecvMsg<'_, '_, SockaddrStorage>) -> CameTo {
    for said in message.cmsgs().into_iter().flatten() {
        match said {
            // The socket was not told to say.
            ControlMessageOwned::Ipv4PacketInfo(info) if info.ipi_spec_dst.s_addr == 0 => return CameTo::Nobody,
            ControlMessageOwned::Ipv4PacketInfo(info) if info.ipi_addr.s_addr != info.ipi_spec_dst.s_addr => {
                return CameTo::All;
            }
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                return CameTo::Address(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into());
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                return CameTo::Address(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
            }
            _ => {}
        }
    }
    CameTo::Nobody
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}
