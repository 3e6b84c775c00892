//! Files for readers that want a path: in memory where the system has such a place.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

struct Scratch {
    dir: TempDir,
    /// Files of the last directory that was made.
    files: HashSet<PathBuf>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

impl Scratch {
    fn new() -> Self {
        let base = std::env::var_os("QCONV_FUZZ_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let memory = Path::new("/dev/shm");
        let base = if base == std::env::temp_dir() && memory.is_dir() { memory.to_path_buf() } else { base };
        let dir =
            tempfile::Builder::new().prefix("qconv-fuzz-").tempdir_in(base).expect("no place for files");
        fs::create_dir(dir.path().join("d")).expect("no place for files");
        Self { dir, files: HashSet::new() }
    }
}

/// The path of a file that holds `data`, until the next one of this name.
pub fn file(name: &str, data: &[u8]) -> PathBuf {
    SCRATCH.with_borrow(|scratch| {
        let path = scratch.dir.path().join(name);
        fs::write(&path, data).expect("no place for a file");
        path
    })
}

/// The path of a directory that holds these files alone, until the next one is made. Names may have directories.
pub fn directory<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> PathBuf {
    SCRATCH.with_borrow_mut(|scratch| {
        let dir = scratch.dir.path().join("d");
        let mut made = HashSet::new();
        for (name, data) in files {
            let path = dir.join(name);
            if fs::write(&path, data).is_err() {
                fs::create_dir_all(path.parent().unwrap_or(&dir)).expect("no place for a directory");
                fs::write(&path, data).expect("no place for a file");
            }
            made.insert(path);
        }
        for old in scratch.files.difference(&made) {
            fs::remove_file(old).expect("a file has gone");
        }
        scratch.files = made;
        dir
    })
}
