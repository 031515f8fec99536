//! Datagrams in batches: one `recvmmsg` and one `sendmmsg` for many.
//!
//! The headers of both calls hold raw pointers, so they live in a thread's own storage and not in a future that has to be `Send`; a worker is one thread.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};
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

struct Buffers {
    receive: MultiHeaders<SockaddrStorage>,
    bytes: Box<[u8]>,
    send: MultiHeaders<SockaddrStorage>,
    addresses: Vec<Option<SockaddrStorage>>,
}

impl Buffers {
    fn new() -> Self {
        Buffers {
            receive: MultiHeaders::preallocate(BATCH_MAX, None),
            bytes: vec![0; BATCH_MAX * DATAGRAM_BYTES_MAX].into_boxed_slice(),
            send: MultiHeaders::preallocate(BATCH_MAX, None),
            addresses: Vec::with_capacity(BATCH_MAX),
        }
    }
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers::new());
}

/// Receives what is there, at most [`BATCH_MAX`] datagrams, and shows each. `take` must not receive or send itself.
///
/// # Errors
/// `WouldBlock` when there is nothing; otherwise what the system says, which concerns no single peer.
pub fn receive(socket: &UdpSocket, mut take: impl FnMut(Datagram<'_>)) -> io::Result<usize> {
    let mut received = 0;
    let outcome = socket.try_io(Interest::READABLE, || {
        received = receive_now(socket.as_raw_fd(), &mut take)?;
        // Fewer than asked for: the socket is empty. Saying so spares the call that would find that out; what arrives from here on wakes us again.
        if received < BATCH_MAX { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match outcome {
        Err(error) if received == 0 => Err(error),
        Ok(()) | Err(_) => Ok(received),
    }
}

fn receive_now(fd: RawFd, take: &mut impl FnMut(Datagram<'_>)) -> io::Result<usize> {
    BUFFERS.with_borrow_mut(|buffers| {
        let mut rooms = buffers.bytes.chunks_exact_mut(DATAGRAM_BYTES_MAX);
        let mut slices: [[IoSliceMut<'_>; 1]; BATCH_MAX] =
            std::array::from_fn(|_| [IoSliceMut::new(rooms.next().unwrap_or_default())]);
        let received = recvmmsg(fd, &mut buffers.receive, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None)?;
        let mut count = 0;
        for message in received {
            count += 1;
            let (Some(peer), Some(bytes)) = (message.address.as_ref().and_then(to_std), message.iovs().next()) else {
                continue;
            };
            take(Datagram { peer, bytes, truncated: message.flags.contains(MsgFlags::MSG_TRUNC) });
        }
        Ok(count)
    })
}

/// Sends the datagrams of `batch` from number `from` on and returns how many of the batch are done with. A datagram that the system refuses (an address
/// without a route) is done with too: its loss is CoAP's ordinary business.
///
/// # Errors
/// `WouldBlock` when the socket takes none now.
pub fn send(socket: &UdpSocket, batch: &Batch, from: usize) -> io::Result<usize> {
    let sent = socket.try_io(Interest::WRITABLE, || match send_now(socket.as_raw_fd(), batch, from) {
        Ok(sent) => Ok(sent),
        Err(Errno::EAGAIN | Errno::ENOBUFS) => Err(io::ErrorKind::WouldBlock.into()),
        Err(error) => {
            tracing::debug!(%error, "datagram not sent");
            Ok(1)
        }
    })?;
    Ok(from + sent)
}

fn send_now(fd: RawFd, batch: &Batch, from: usize) -> nix::Result<usize> {
    BUFFERS.with_borrow_mut(|buffers| {
        let mut slices = [[IoSlice::new(&[])]; BATCH_MAX];
        buffers.addresses.clear();
        for (slice, at) in slices.iter_mut().zip(from..batch.len()) {
            let Some((peer, bytes)) = batch.get(at) else { break };
            *slice = [IoSlice::new(bytes)];
            buffers.addresses.push(Some(peer.into()));
        }
        let none: [ControlMessage<'_>; 0] = [];
        let addresses = &buffers.addresses;
        Ok(sendmmsg(fd, &mut buffers.send, &slices, addresses, none, MsgFlags::MSG_DONTWAIT)?.count())
    })
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))
}
