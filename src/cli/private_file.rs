//! Files written by commands: never over an existing one, secrets readable by their owner only, complete or not at all.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::Failure;

/// Writes a file that anybody may read.
pub fn write(path: &Path, text: &str) -> Result<(), Failure> {
    create(path, text, 0o644)
}

/// Writes a secret, mode 0600.
pub fn write_secret(path: &Path, text: &str) -> Result<(), Failure> {
    create(path, text, 0o600)
}

/// Creates a folder and its parents; the last one with mode 0700 if `private`.
pub fn create_folder(path: &Path, private: bool) -> Result<(), Failure> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(if private { 0o700 } else { 0o755 })
        .create(path)
        .map_err(|e| Failure::unavailable(format!("cannot create the folder {}: {e}", path.display())))
}

fn create(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::input(format!("{} exists already", path.display()))
                .help("move it away, or choose another folder"),
            _ => Failure::unavailable(format!("cannot create {}: {e}", path.display())),
        })?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| {
        // Half a key is worse than none.
        let _ = fs::remove_file(path);
        Failure::unavailable(format!("cannot write {}: {e}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_is_for_its_owner_only_and_nothing_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k");
        write_secret(&path, "a").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let failure = write_secret(&path, "b").unwrap_err();
        assert_eq!(failure.exit, crate::cli::Exit::Input);
        assert_eq!(fs::read_to_string(&path).unwrap(), "a");
    }
}
