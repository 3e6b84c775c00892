//! What is particular to an operating system, each with its portable fallback.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_128;

use crate::error::{Error, Result};

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

/// Opens a file that was created here for reading and writing: never what a symbolic link leads to, and
/// without waiting for the other side of a pipe.
///
/// # Errors
/// As the system says; of a link `FilesystemLoop` or the like.
pub fn open_no_link(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits().cast_signed(),
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

/// What tells a file with one name alone from all others, by whatever path; `None` where the system does not tell, or
/// it has several names (hard links).
pub fn sole_identity(meta: &Metadata) -> Option<(u64, u64)> {
    #[cfg(unix)]
    let is_sole = std::os::unix::fs::MetadataExt::nlink(meta) == 1;
    #[cfg(not(unix))]
    let is_sole = false;
    (meta.is_file() && is_sole).then(|| (disk(meta), identity(meta)))
}

/// Longest name that is a part of a hidden one as it is: disks take 255 bytes, those that encrypt names 143.
const LONGEST_NAME: usize = 120;

/// A hidden name beside `path`, for what belongs to it while it is made. A name that is too long for that, or no
/// UTF-8, gives a short one with its hash.
pub fn hidden(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    let text = name.to_string_lossy();
    if name.to_str().is_some() && text.len() <= LONGEST_NAME {
        return path.with_file_name(format!(".{text}.qconv-{what}"));
    }
    let hash = XxHash3_128::oneshot(name.as_encoded_bytes());
    let begins = text.char_indices().take_while(|(at, c)| at + c.len_utf8() <= LONGEST_NAME / 2);
    let begins: String = begins.map(|(_, c)| c).collect();
    path.with_file_name(format!(".{begins}~{hash:032x}.qconv-{what}"))
}

/// Whether a path names a directory by how it ends: `out/`, which is no name of a file.
pub fn ends_as_directory(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    let is_end = |byte: &u8| std::path::is_separator(char::from(*byte));
    let text = text.strip_suffix(b".").filter(|rest| rest.last().is_some_and(is_end)).unwrap_or(text);
    text.last().is_some_and(is_end)
}

/// Gives a file the rights of another, which it is to replace; `lasting` as they are, and otherwise so that it can
/// be written on. Where that cannot be, it keeps its own.
pub fn take_mode(path: &Path, from: &Path, lasting: bool) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let Some(meta) = fs::symlink_metadata(from).ok().filter(Metadata::is_file) else { return };
        let mode = meta.mode() & 0o777 | if lasting { 0 } else { 0o600 };
        // A disk without rights has nothing to keep.
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = (path, from, lasting);
}

/// How often it is tried to open what others put there and take away.
const TRIES: usize = 100;

/// Opens a file that is nobody else's, or makes it, and locks it; `None` where another process has done so. A link,
/// a pipe, or a file of another user, that lies there is removed.
///
/// # Errors
/// `Io`; nothing new stays then.
pub fn open_locked(path: &Path) -> Result<Option<File>> {
    let failed = |e| Error::io("create", path, e);
    let removed = || fs::remove_file(path).map_err(|e| Error::io("remove", path, e));
    for _ in 0..TRIES {
        // Some disks give all files to one user: what was made here is ours all the same.
        let mut is_new = false;
        let found = match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_file() => open_no_link(path),
            Ok(meta) if meta.is_dir() => return Err(failed(io::ErrorKind::IsADirectory.into())),
            Ok(_) => {
                removed()?;
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                is_new = true;
                OpenOptions::new().read(true).write(true).create_new(true).open(path)
            }
            Err(e) => Err(e),
        };
        let file = match found {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => continue,
            Err(e) => return Err(failed(e)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            // Where the disk knows no locks there is nothing better.
            Err(TryLockError::Error(e)) if knows_no_locks(&e) => {}
            Err(TryLockError::Error(e)) => {
                if is_new {
                    // The error is the news.
                    let _ = removed();
                }
                return Err(Error::io("lock", path, e));
            }
        }
        // Who had it may have removed it in the meantime: then this is the lock of nothing.
        let meta = file.metadata().map_err(failed)?;
        match (is_still(path, &meta), is_new || is_own(&meta)) {
            (true, true) => return Ok(Some(file)),
            (true, false) => removed()?,
            (false, _) => {}
        }
    }
    Err(failed(io::ErrorKind::ResourceBusy.into()))
}

/// Whether an error of a lock says that the disk has none: network disks whose server has no lock service say that
/// there are no locks left.
fn knows_no_locks(e: &io::Error) -> bool {
    #[cfg(unix)]
    if e.raw_os_error() == Some(rustix::io::Errno::NOLCK.raw_os_error()) {
        return true;
    }
    e.kind() == io::ErrorKind::Unsupported
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Hidden names fit on the disk however long a name is, and are the same again, and are others for others.
    #[test]
    fn hidden_names_are_short() {
        let of = |name: &str| hidden(Path::new(name), "plain.qpack");
        assert_eq!(of("d/m.gguf"), Path::new("d/.m.gguf.qconv-plain.qpack"));
        let long = "\u{e4}".repeat(127);
        for name in [&long, &of(&long).to_string_lossy().into_owned(), &"x".repeat(255)] {
            let found = of(name);
            assert!(found.as_os_str().len() <= 143, "{found:?}");
            assert_eq!(found, of(name));
            assert_ne!(found, of(&name.replacen(['\u{e4}', 'x'], "y", 1)));
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_disk_without_locks_is_known() {
        let none = io::Error::from_raw_os_error(rustix::io::Errno::NOLCK.raw_os_error());
        assert!(knows_no_locks(&none) && knows_no_locks(&io::ErrorKind::Unsupported.into()));
        assert!(!knows_no_locks(&io::ErrorKind::PermissionDenied.into()));
    }

    #[cfg(target_os = "linux")]
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
