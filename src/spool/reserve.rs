//! Room on the disk that nobody else takes, for the day it is full.
//!
//! A queue on a full disk can only shrink if something can still be written: that messages were delivered, and the log copied into the
//! database. Without room for that a full spool would stay full after its upstream has come back. The file `spool.reserve` keeps that room; it
//! is given up when a write finds the disk full, and taken again, as far as there is room, when the spool writes again. The database is kept from growing
//! by more than it (`max_page_count`), so that what was taken into the log always finds its place.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::posix_fallocate;

const FILE: &str = "spool.reserve";

#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    bytes_wanted: u64,
    bytes: u64,
}

impl Reserve {
    /// Takes nothing yet, and gives up what an earlier run had: opening a database on a full disk needs room, too.
    pub fn new(data_dir: &Path, bytes_wanted: u64) -> Self {
        let mut reserve = Reserve { path: data_dir.join(FILE), bytes_wanted, bytes: 0 };
        reserve.release();
        reserve
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives the room to whoever writes next.
    pub fn release(&mut self) {
        self.bytes = 0;
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "reserve cannot be given up");
        }
    }

    /// Takes as much as is wanted, or a half, or a quarter.
    pub fn take(&mut self) {
        if self.bytes == self.bytes_wanted {
            return;
        }
        for part in [1, 2, 4, 8] {
            let bytes = self.bytes_wanted / part;
            if bytes <= self.bytes {
                return;
            }
            match self.allocate(bytes) {
                Ok(()) => {
                    self.bytes = bytes;
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, bytes, "no room for the reserve");
                    self.release();
                }
            }
        }
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.path)?;
        let length = nix::libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        match posix_fallocate(&file, 0, length) {
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => {
                // A file system without allocation in advance.
                const CHUNK: [u8; 4096] = [0; 4096];
                for _ in 0..bytes.div_ceil(CHUNK.len() as u64) {
                    file.write_all(&CHUNK)?;
                }
                file.sync_data()
            }
            allocated => allocated.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_given_up_and_not_left_over() {
        let folder = tempfile::tempdir().unwrap();
        let mut reserve = Reserve::new(folder.path(), 100_000);
        let on_disk = || fs::metadata(folder.path().join(FILE)).map_or(0, |file| file.len());
        assert_eq!((reserve.bytes(), on_disk()), (0, 0));
        reserve.take();
        assert_eq!((reserve.bytes(), on_disk()), (100_000, 100_000));
        reserve.release();
        assert_eq!((reserve.bytes(), on_disk()), (0, 0));
        reserve.take();
        assert_eq!(Reserve::new(folder.path(), 5).bytes(), 0);
        assert_eq!(on_disk(), 0, "what an earlier run had is given up");
    }
}
