//! The linked ggml and llama.cpp: the only place that calls them.
//!
//! Everything here is a safe wrapper. No pointer and no type of the library leaves this module,
//! sizes and token ids are checked before a call (the library stops the process where it finds
//! them wrong), and no panic of ours runs through its frames.
//!
//! What this cannot prevent: a GGUF file that is well-formed and yet absurd can trip an assertion
//! inside the library, which ends the process. The last words are then printed to stderr. Read
//! untrusted files with [`crate::container::gguf`] first; it refuses what is malformed.
#![allow(unsafe_code)]

mod adapter;
mod context;
pub mod gguf;
mod log;
mod model;
mod observe;
pub mod oracle;

pub use context::{Context, ContextOptions, Logits, Pooling};
pub use log::{Buffers, set_verbose};
pub use model::{Model, ModelOptions, SpecialTokens, VocabType};
pub use observe::{Node, Observer, Op};

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;
use std::sync::OnceLock;

use llama_cpp_sys_2 as sys;

use crate::error::{Error, Result};

/// Prepares the library, once per process. Every entry of this module calls it.
///
/// # Errors
/// `Unsupported` when this CPU lacks an instruction set that the library was compiled for.
pub fn init() -> Result<()> {
    static STATE: OnceLock<Result<(), String>> = OnceLock::new();
    let state = STATE.get_or_init(|| {
        check_cpu()?;
        log::install();
        // SAFETY: called once, before any other function of llama.cpp; needs nothing.
        unsafe { sys::llama_backend_init() };
        Ok(())
    });
    state.clone().map_err(|missing| {
        Error::unsupported(format!(
            "this processor lacks {missing}, which the linked ggml was compiled to use"
        ))
        .hint("build qconv on this machine with the GGML_* switches of .cargo/config.toml set to OFF, or use a machine that has it; commands that execute nothing still work")
    })
}

/// Compares what the library was compiled for with what the CPU has. The `ggml_cpu_has_*` answers
/// are constants of the compilation, not tests of the machine.
fn check_cpu() -> Result<(), String> {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    {
        type Compiled = unsafe extern "C" fn() -> c_int;
        let needs: [(Compiled, bool, &str); 7] = [
            (sys::ggml_cpu_has_ssse3, is_x86_feature_detected!("ssse3"), "SSSE3"),
            (sys::ggml_cpu_has_avx, is_x86_feature_detected!("avx"), "AVX"),
            (sys::ggml_cpu_has_avx2, is_x86_feature_detected!("avx2"), "AVX2"),
            (sys::ggml_cpu_has_fma, is_x86_feature_detected!("fma"), "FMA"),
            (sys::ggml_cpu_has_f16c, is_x86_feature_detected!("f16c"), "F16C"),
            (sys::ggml_cpu_has_bmi2, is_x86_feature_detected!("bmi2"), "BMI2"),
            (sys::ggml_cpu_has_avx512, is_x86_feature_detected!("avx512f"), "AVX-512"),
        ];
        let missing: Vec<&str> = needs
            .into_iter()
            // SAFETY: these functions return a constant.
            .filter(|(compiled, present, _)| unsafe { compiled() } != 0 && !present)
            .map(|(.., name)| name)
            .collect();
        if !missing.is_empty() {
            return Err(missing.join(", "));
        }
    }
    Ok(())
}

/// What is linked, for `qconv --version`.
#[derive(Clone, Debug)]
pub struct Linked {
    /// ggml's version, as in `0.26.0`.
    pub ggml_version: String,
    /// ggml's commit, where the build recorded one.
    pub ggml_commit: String,
    /// llama.cpp's version.
    pub llama_version: String,
    /// The backends that were compiled in, each with its devices: (`CPU`, [`Intel ...`]).
    pub backends: Vec<(String, Vec<String>)>,
    /// The library's own summary of instruction sets in use.
    pub system_info: String,
}

/// Names the linked library and its backends.
///
/// # Errors
/// As [`init`].
pub fn linked() -> Result<Linked> {
    init()?;
    let (version, commit, llama) =
        // SAFETY: all return a constant string of the library.
        unsafe { (text(sys::ggml_version()), text(sys::ggml_commit()), text(sys::llama_version())) };
    let mut backends = Vec::new();
    // SAFETY: after `init` the registry is complete and constant; indices stay below its counts,
    // and the names it returns live as long as the library.
    let system_info = unsafe {
        for i in 0..sys::ggml_backend_reg_count() {
            let reg = sys::ggml_backend_reg_get(i);
            let devices = (0..sys::ggml_backend_reg_dev_count(reg))
                .map(|d| text(sys::ggml_backend_dev_description(sys::ggml_backend_reg_dev_get(reg, d))))
                .collect();
            backends.push((text(sys::ggml_backend_reg_name(reg)), devices));
        }
        text(sys::llama_print_system_info())
    };
    Ok(Linked {
        ggml_version: version,
        ggml_commit: commit,
        llama_version: llama,
        backends,
        system_info: system_info.trim().to_owned(),
    })
}

/// ggml's own facts about a block type, to test our table against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeFacts {
    /// `ggml_type_name`.
    pub name: String,
    /// Elements of a block.
    pub block_size: u64,
    /// Bytes of a block.
    pub type_size: u64,
}

/// ggml's facts about the type with number `id`; `None` where ggml has no such type, or no longer.
pub fn type_facts(id: u32) -> Option<TypeFacts> {
    if id >= sys::GGML_TYPE_COUNT {
        return None;
    }
    // SAFETY: `id` is below GGML_TYPE_COUNT, the length of ggml's table, whose rows are constant.
    let (name, traits) = unsafe { (sys::ggml_type_name(id), &*sys::ggml_get_type_traits(id)) };
    let block_size = u64::try_from(traits.blck_size).ok().filter(|&n| n > 0)?;
    // SAFETY: a name is null or a constant string of the library.
    let name = unsafe { text(name) };
    Some(TypeFacts { name, block_size, type_size: traits.type_size as u64 })
}

/// A copy of a C string; empty for null.
///
/// # Safety
/// `s` is null, or a null-terminated string that stays unchanged during the call.
unsafe fn text(s: *const c_char) -> String {
    if s.is_null() {
        return String::new();
    }
    // SAFETY: not null; the rest is the caller's promise.
    unsafe { CStr::from_ptr(s) }.to_string_lossy().into_owned()
}

/// A path as the library takes it.
fn c_path(path: &Path) -> Result<CString> {
    #[cfg(unix)]
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
    #[cfg(not(unix))]
    let bytes = path
        .to_str()
        .ok_or_else(|| Error::misuse("the path is not Unicode; llama.cpp cannot open it").at(path))?
        .as_bytes();
    CString::new(bytes).map_err(|_| Error::misuse("the path holds a null byte").at(path))
}
