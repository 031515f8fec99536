//! Gives back the memory that the start of a program has taken.
//!
//! A start runs most of a program once. The kernel maps code 64 KiB at a time around whatever runs, so afterwards nearly all of it counts as
//! resident, and stays so while nothing else wants the memory. [`release_code`] takes it out; what runs again is mapped again, one page fault
//! for 64 KiB, without reading the disk as long as the file is in the page cache.

use std::fs;
use std::io;
use std::ops::Range;

/// Takes the running program's own code out of the resident memory of the process. Gives the bytes of address space it did this for.
///
/// # Errors
/// `/proc` is not there, or the kernel refuses.
pub fn release_code() -> io::Result<usize> {
    let program = fs::read_link("/proc/self/exe")?;
    let mappings = fs::read_to_string("/proc/self/smaps")?;
    let mut bytes = 0;
    for range in clean_code(&mappings, &program.to_string_lossy()) {
        bytes += range.len();
        forget(range)?;
    }
    Ok(bytes)
}

/// Where `program` is mapped as code, privately, and no page differs from the file (`proc_pid_smaps(5)`).
fn clean_code(mappings: &str, program: &str) -> Vec<Range<usize>> {
    let mut clean = Vec::new();
    let mut candidate = None;
    for line in mappings.lines() {
        if let Some(anonymous) = line.strip_prefix("Anonymous:") {
            // A breakpoint of a debugger is such a page.
            clean.extend(candidate.take().filter(|_| anonymous.trim() == "0 kB"));
        } else if line.starts_with(|c: char| c.is_ascii_hexdigit() && !c.is_ascii_uppercase()) {
            candidate = code_of(line, program);
        }
    }
    clean
}

/// Reads `5581e000-55a3f000 r-xp 00012000 fe:00 5619735    /usr/bin/tidegate`.
fn code_of(line: &str, program: &str) -> Option<Range<usize>> {
    let (addresses, rest) = line.split_once(' ')?;
    let (permissions, rest) = rest.split_once(' ')?;
    let path = rest.split_once('/').map(|(_, path)| path)?;
    if permissions != "r-xp" || program.strip_prefix('/') != Some(path) {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[expect(unsafe_code, reason = "madvise(2) has no safe form")]
fn forget(range: Range<usize>) -> io::Result<()> {
    let start = std::ptr::without_provenance_mut(range.start);
    // SAFETY: the range is a private mapping of the running program's own file, of which no page has been changed. Nobody can write to it, it is never
    // unmapped while the program runs, and the file cannot be written to meanwhile (ETXTBSY). After MADV_DONTNEED every access finds the
    // same bytes, from the file.
    match unsafe { libc::madvise(start, range.len(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPPINGS: &str = "\
00400000-00410000 r--p 00000000 fe:00 7 /opt/a b/tidegate
Rss:                  40 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
00410000-00c10000 r-xp 00010000 fe:00 7                                  /opt/a b/tidegate
Rss:                7000 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00c10000-00c20000 r-xp 00810000 fe:00 7 /opt/a b/tidegate
Anonymous:             4 kB
00c20000-00c30000 rw-p 00820000 fe:00 7 /opt/a b/tidegate
Anonymous:             0 kB
7f0000000000-7f0000100000 r-xp 00000000 fe:00 9 /lib/libc.so.6
Anonymous:             0 kB
7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
";

    #[test]
    fn only_the_programs_own_unchanged_code_is_found() {
        let code = 0x41_0000..0xc1_0000;
        assert_eq!(clean_code(MAPPINGS, "/opt/a b/tidegate"), std::slice::from_ref(&code));
        assert!(clean_code(MAPPINGS, "/opt/a b/other").is_empty());
        assert!(clean_code(MAPPINGS, "tidegate").is_empty());
        for noise in ["", "Anonymous: 0 kB", "zz-1 r-xp 0 0 0 /x\nAnonymous: 0 kB", "1 r-xp\n", "10-f r-xp"] {
            assert!(clean_code(noise, "/x").is_empty(), "{noise}");
        }
    }

    #[test]
    fn a_program_goes_on_without_its_code_in_memory() {
        let resident = || {
            let mappings = fs::read_to_string("/proc/self/smaps").unwrap();
            let program = fs::read_link("/proc/self/exe").unwrap();
            let of_program = mappings
                .split_inclusive("VmFlags")
                .find(|m| m.lines().any(|line| code_of(line, &program.to_string_lossy()).is_some()));
            let rss = of_program.and_then(|m| m.lines().find_map(|line| line.strip_prefix("Rss:"))).unwrap();
            rss.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
        };
        let before = resident();
        assert!(release_code().unwrap() > 0);
        let after = resident();
        assert!(after < before, "{before} kB, then {after} kB");
    }
}
