//! An origin that does what the request's path says, well or badly: `/api/FAULT/ID`. What it gives of an answer is that request's own, by its id, but
//! for what it was never asked for.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What happens to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Well,
    /// One byte after the other, slowly.
    SlowBytes,
    /// An answer as always, and then the end of a connection that was said to be kept.
    ClosesAfter,
    /// No answer.
    BlackHole,
    /// Head and half a body, and then nothing.
    Stalls,
    ResetAtOnce,
    ResetInBody,
    /// A body without length, ended by a half-close.
    HalfClose,
    /// Two hundred 103s before the answer.
    Storm,
    /// 103s for ever.
    EndlessStorm,
    /// More body than it promised: what looks like another answer. (Sent later, it would be the answer to whatever is asked next: HTTP/1.1 cannot tell.)
    TooLong,
    TooShort,
    Garbage,
    HugeHead,
    /// An answer before the body was read, and the end.
    Early,
    BadChunk,
}

impl Fault {
    pub const ALL: [Fault; 16] = [
        Fault::Well,
        Fault::SlowBytes,
        Fault::ClosesAfter,
        Fault::BlackHole,
        Fault::Stalls,
        Fault::ResetAtOnce,
        Fault::ResetInBody,
        Fault::HalfClose,
        Fault::Storm,
        Fault::EndlessStorm,
        Fault::TooLong,
        Fault::TooShort,
        Fault::Garbage,
        Fault::HugeHead,
        Fault::Early,
        Fault::BadChunk,
    ];
}

/// The body of the answer to the request `id`.
pub fn body_of(id: &str) -> String {
    format!("{id};").repeat(100)
}

pub struct ChaosOrigin {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stopped: AtomicBool,
    requests: AtomicUsize,
    streams: Mutex<Vec<TcpStream>>,
}

impl ChaosOrigin {
    pub fn start() -> ChaosOrigin {
        ChaosOrigin::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    pub fn start_at(address: SocketAddr) -> ChaosOrigin {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let accepting = thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if of_thread.stopped.load(Ordering::Relaxed) {
                    return;
                }
                of_thread.streams.lock().unwrap().extend(stream.try_clone());
                let shared = of_thread.clone();
                thread::spawn(move || {
                    let _ = serve(&stream, &shared);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        ChaosOrigin { address, shared, accepting: Some(accepting) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests for which it began to do something.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl Drop for ChaosOrigin {
    /// The end of its process, as others see it: nothing listens, every connection is closed.
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.address));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        for stream in self.shared.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve(stream: &TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        shared.requests.fetch_add(1, Ordering::Relaxed);
        let target = head.split(' ').nth(1).unwrap_or_default();
        let mut words = target.split('/').skip(2);
        let (fault, id) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let fault = Fault::ALL.into_iter().find(|known| format!("{known:?}") == fault).unwrap_or(Fault::Well);
        if fault != Fault::Early {
            let head = head.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            io::copy(&mut (&mut reader).take(length.unwrap_or(0)), &mut io::sink())?;
        }
        if !answer(stream, fault, id)? {
            return Ok(());
        }
    }
}

/// Whether the connection goes on.
fn answer(mut stream: &TcpStream, fault: Fault, id: &str) -> io::Result<bool> {
    let body = body_of(id);
    let half = &body[..body.len() / 2];
    let head = |length: usize| format!("HTTP/1.1 200 OK\r\nX-Id: {id}\r\nContent-Length: {length}\r\n\r\n");
    let whole = format!("{}{body}", head(body.len()));
    let poison = "HTTP/1.1 200 OK\r\nX-Id: poison\r\nContent-Length: 6\r\n\r\npoison";
    let mut say = |text: &str| stream.write_all(text.as_bytes());
    match fault {
        Fault::Well => say(&whole)?,
        Fault::SlowBytes => {
            for byte in whole.as_bytes().chunks(whole.len() / 40) {
                stream.write_all(byte)?;
                thread::sleep(Duration::from_millis(10));
            }
        }
        Fault::ClosesAfter => {
            say(&whole)?;
            return Ok(false);
        }
        Fault::BlackHole => wait_for_the_end(stream),
        Fault::Stalls => {
            say(&format!("{}{half}", head(body.len())))?;
            wait_for_the_end(stream);
        }
        Fault::ResetAtOnce => reset(stream)?,
        Fault::ResetInBody => {
            say(&format!("{}{half}", head(body.len())))?;
            reset(stream)?;
        }
        Fault::HalfClose => {
            say(&format!("HTTP/1.1 200 OK\r\nX-Id: {id}\r\n\r\n{body}"))?;
            stream.shutdown(Shutdown::Write)?;
            wait_for_the_end(stream);
        }
        Fault::Storm => say(&format!("{}{whole}", EARLY_HINTS.repeat(200)))?,
        Fault::EndlessStorm => loop {
            say(EARLY_HINTS)?;
            thread::sleep(Duration::from_millis(5));
        },
        Fault::TooLong => say(&format!("{whole}{poison}"))?,
        Fault::TooShort => {
            say(&format!("{}{half}", head(body.len())))?;
            return Ok(false);
        }
        Fault::Garbage => {
            say("I am no HTTP\r\n\r\n")?;
            return Ok(false);
        }
        Fault::HugeHead => {
            say("HTTP/1.1 200 OK\r\nX-Huge: ")?;
            (0..1024).try_for_each(|_| say(&"x".repeat(1024)))?;
            return Ok(false);
        }
        Fault::Early => {
            say(&format!(
                "HTTP/1.1 413 Too Large\r\nX-Id: {id}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            ))?;
            return Ok(false);
        }
        Fault::BadChunk => {
            say(&format!(
                "HTTP/1.1 200 OK\r\nX-Id: {id}\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{}\r\nzz\r\n",
                &half[..16]
            ))?;
            return Ok(false);
        }
    }
    Ok(!matches!(fault, Fault::BlackHole | Fault::Stalls | Fault::ResetAtOnce | Fault::ResetInBody | Fault::HalfClose))
}

const EARLY_HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n";

fn wait_for_the_end(mut stream: &TcpStream) {
    let _ = io::copy(&mut stream, &mut io::sink());
}

fn reset(stream: &TcpStream) -> io::Result<()> {
    // The clones of the stream stay open: without a shutdown nothing would be sent.
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
    stream.shutdown(Shutdown::Both)
}
