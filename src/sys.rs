//! What is particular to an operating system, each with its portable fallback.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::Path;

/// Reads exactly `buf.len()` bytes at `offset`; the file's cursor plays no part, so many threads
/// may read one file.
///
/// # Errors
/// `UnexpectedEof` when the file is shorter.
#[cfg(unix)]
pub fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

/// Writes all of `buf` at `offset`.
///
/// # Errors
/// As the system says: disk full, quota.
#[cfg(unix)]
pub fn write_all_at(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, buf, offset)
}

/// As on Unix, on Windows' own positioned reads (which move the cursor; nobody here uses it).
#[cfg(windows)]
pub fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// As on Unix, on Windows' own positioned writes.
#[cfg(windows)]
pub fn write_all_at(file: &File, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                buf = &buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(not(any(unix, windows)))]
mod portable {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::sync::Mutex;

    // One cursor for all threads: correct, slow.
    static CURSOR: Mutex<()> = Mutex::new(());

    /// Portable fallback: seek and read under a lock.
    pub fn read_exact_at(mut file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let _guard = CURSOR.lock().unwrap_or_else(|e| e.into_inner());
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buf)
    }

    /// Portable fallback: seek and write under a lock.
    pub fn write_all_at(mut file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
        let _guard = CURSOR.lock().unwrap_or_else(|e| e.into_inner());
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(buf)
    }
}
#[cfg(not(any(unix, windows)))]
pub use portable::{read_exact_at, write_all_at};

/// Bytes that an ordinary user may still write on the disk that holds `dir`; `None` when the
/// system does not tell.
pub fn free_space(dir: &Path) -> Option<u64> {
    fs4::available_space(dir).ok()
}

/// Bytes that a file takes on its disk, which are fewer than it has where it was never written; 0 when the system
/// does not tell.
pub fn allocated(meta: &Metadata) -> u64 {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::blocks(meta).saturating_mul(512);
    #[cfg(not(unix))]
    {
        let _ = meta;
        0
    }
}

/// Opens a file that was created here for reading and writing: never what a symbolic link leads to.
///
/// # Errors
/// As the system says; of a link `FilesystemLoop` or the like.
pub fn open_no_link(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        rustix::fs::OFlags::NOFOLLOW.bits().cast_signed(),
    );
    #[cfg(not(unix))]
    if std::fs::symlink_metadata(path)?.is_symlink() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    options.open(path)
}

/// Whether a file is a regular one of this user, with this name alone: not one that somebody else put there, by
/// a link to another file or of their own.
pub fn is_own(meta: &Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        meta.is_file() && meta.nlink() == 1 && meta.uid() == rustix::process::geteuid().as_raw()
    }
    #[cfg(not(unix))]
    meta.is_file()
}

/// What tells the disk of a file from others; 0 when the system does not tell.
pub fn disk(meta: &Metadata) -> u64 {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::dev(meta);
    #[cfg(not(unix))]
    {
        let _ = meta;
        0
    }
}

/// When a file last changed in any way, in nanoseconds of the system's time, where somebody may have set its time of
/// change; 0 when the system does not tell.
pub fn changed(meta: &Metadata) -> i128 {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec())
    }
    #[cfg(not(unix))]
    {
        let _ = meta;
        0
    }
}

/// What tells a file or directory from others on its disk; 0 when the system does not tell.
pub fn identity(meta: &Metadata) -> u64 {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::ino(meta);
    #[cfg(not(unix))]
    {
        let _ = meta;
        0
    }
}

/// Whether `path` still leads to the file that was opened.
pub fn is_still(path: &Path, opened: &Metadata) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            (meta.dev(), meta.ino()) == (opened.dev(), opened.ino())
        }
        #[cfg(not(unix))]
        {
            meta.is_file() && meta.len() == opened.len()
        }
    })
}

/// Memory that programs may still take without others being swapped out; `None` when the system does
/// not tell.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Makes a rename in `dir` durable, where the system needs that to be said.
pub fn sync_directory(dir: &Path) {
    // A directory that cannot be opened or flushed costs durability across a power cut only.
    if cfg!(unix)
        && let Ok(dir) = File::open(dir)
    {
        let _ = dir.sync_all();
    }
}

/// The most memory in bytes that this process had in use at once, mapped files included as far as
/// they were read; `None` when the system does not tell.
pub fn peak_memory() -> Option<u64> {
    // proc(5): `VmHWM:     1772 kB`.
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Lets [`peak_memory`] begin anew; returns whether the system can.
pub fn reset_peak_memory() -> bool {
    // proc(5): 5 sets the peak to what is in use now.
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn the_peak_is_seen_and_reset() {
        let before = super::peak_memory().unwrap();
        let block = std::hint::black_box(vec![1u8; 256 << 20]);
        let peak = super::peak_memory().unwrap();
        drop(block);
        assert!(peak >= 256 << 20 && peak >= before);
        if super::reset_peak_memory() {
            assert!(super::peak_memory().unwrap() < peak);
        }
    }
}
