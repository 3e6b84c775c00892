//! What the library says: kept for error messages, shown only on request.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::io::Write;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_sys_2 as sys;

/// Lines kept per thread.
const KEPT: usize = 8;

static VERBOSE: AtomicBool = AtomicBool::new(false);

thread_local! {
    // Warnings and errors of this thread, oldest first. The library reports a failed load or
    // decode on the calling thread, so calls on different threads do not mix their reasons.
    static LINES: RefCell<VecDeque<String>> = const { RefCell::new(VecDeque::new()) };
    // Buffers that this thread was told of.
    static BUFFERS: Cell<Buffers> = const { Cell::new(Buffers { weights: 0, cache: 0, compute: 0 }) };
}

/// Bytes that the library took, on all devices together. It tells them in its log only, to a hundredth
/// of a MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    /// Weights: mapped, read, or rearranged.
    pub weights: u64,
    /// What is kept of the tokens read: keys and values, or the state of a recurrent model.
    pub cache: u64,
    /// The computation's intermediate results, and its output.
    pub compute: u64,
}

impl Buffers {
    /// Adds what a line of the log says: `llama_kv_cache:  CPU KV buffer size =  5.62 MiB`.
    fn add(&mut self, line: &str) {
        let Some((what, size)) = line.split_once(" buffer size = ") else { return };
        let Some(mib) = size.trim().strip_suffix("MiB").and_then(|n| n.trim().parse::<f64>().ok()) else {
            return;
        };
        let field = match what.split_whitespace().last() {
            Some("model" | "LoRA") => &mut self.weights,
            Some("compute" | "output") => &mut self.compute,
            _ => &mut self.cache,
        };
        *field = field.saturating_add((mib * f64::from(1 << 20)) as u64);
    }
}

/// The buffers that were announced on this thread since [`clear`].
pub(super) fn buffers() -> Buffers {
    BUFFERS.get()
}

/// Whether everything the library says goes to stderr. Off at first.
pub fn set_verbose(on: bool) {
    VERBOSE.store(on, Ordering::Relaxed);
}

/// Routes the library's log and its last words through us.
pub(super) fn install() {
    // SAFETY: both callbacks are `extern "C"` functions that live as long as the process, take no
    // user data, and let no panic out.
    unsafe {
        sys::llama_log_set(Some(on_log), std::ptr::null_mut());
        sys::ggml_set_abort_callback(Some(on_abort));
    }
}

/// Forgets this thread's lines, before a call whose reason of failure will be asked for.
pub(super) fn clear() {
    LINES.with_borrow_mut(VecDeque::clear);
    BUFFERS.set(Buffers::default());
}

/// What the library gave as reason on this thread since [`clear`]: its lines, without the names
/// of its functions, most specific first. `fallback` where it said nothing.
pub(super) fn reason(fallback: &str) -> String {
    LINES.with_borrow(|lines| {
        let mut said: Vec<&str> = Vec::new();
        for line in lines {
            let line = strip_function(line);
            let line = line.strip_prefix("error loading model: ").unwrap_or(line);
            // "failed to load model" and the like only repeat what the caller says already.
            if !line.is_empty() && !said.contains(&line) && !line.starts_with("failed to load model") {
                said.push(line);
            }
        }
        if said.is_empty() { fallback.to_owned() } else { said.join("; ") }
    })
}

/// `llama_model_load: error` without the leading function name.
fn strip_function(line: &str) -> &str {
    match line.split_once(": ") {
        Some((name, rest)) if name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') => rest.trim(),
        _ => line.trim(),
    }
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, message: *const c_char, _: *mut c_void) {
    // A panic must not unwind into C++; there is nowhere to report it.
    let _ = catch_unwind(|| {
        if message.is_null() {
            return;
        }
        // SAFETY: the library passes a null-terminated string that lives during the call.
        let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
        if VERBOSE.load(Ordering::Relaxed) {
            let _ = std::io::stderr().write_all(message.as_bytes());
        }
        if level == sys::GGML_LOG_LEVEL_INFO {
            let _ = BUFFERS.try_with(|buffers| {
                let mut sum = buffers.get();
                sum.add(&message);
                buffers.set(sum);
            });
        }
        if matches!(level, sys::GGML_LOG_LEVEL_WARN | sys::GGML_LOG_LEVEL_ERROR) {
            // `try_with` and `try_borrow_mut`: the thread may be ending, or be here already.
            let _ = LINES.try_with(|lines| {
                let Ok(mut lines) = lines.try_borrow_mut() else { return };
                for line in message.lines().filter(|l| !l.trim().is_empty()) {
                    if lines.len() == KEPT {
                        lines.pop_front();
                    }
                    lines.push_back(line.to_owned());
                }
            });
        }
    });
}

unsafe extern "C" fn on_abort(message: *const c_char) {
    let _ = catch_unwind(|| {
        // SAFETY: null, or a null-terminated string that lives during the call.
        let message = unsafe { super::text(message) };
        let mut stderr = std::io::stderr();
        let _ = writeln!(stderr, "error: the linked ggml cannot go on and ends the process: {message}");
        let _ = writeln!(
            stderr,
            "  hint: the file is damaged, or describes a model that cannot exist; `qconv inspect` shows what it says"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_add_up() {
        let mut sum = Buffers::default();
        for line in [
            "load_tensors:   CPU_Mapped model buffer size =    98.50 MiB\n",
            "load_tensors:   CPU_REPACK model buffer size =     7.50 MiB\n",
            "llama_context:        CPU  output buffer size =     0.25 MiB\n",
            "llama_kv_cache:        CPU KV buffer size =     5.00 MiB\n",
            "sched_reserve:        CPU compute buffer size =     0.50 MiB\n",
            "~llama_context:        CPU compute buffer size is   0.3982 MiB, matches expectation\n",
        ] {
            sum.add(line);
        }
        assert_eq!(sum, Buffers { weights: 106 << 20, cache: 5 << 20, compute: 3 << 18 });
    }

    #[test]
    fn reasons_lose_function_names_and_repetition() {
        clear();
        for line in [
            c"llama_model_load: error loading model: missing tensor 'output_norm.weight'\n",
            c"llama_model_load_from_file_impl: failed to load model\n",
        ] {
            // SAFETY: a null-terminated string.
            unsafe { on_log(sys::GGML_LOG_LEVEL_ERROR, line.as_ptr(), std::ptr::null_mut()) };
        }
        assert_eq!(reason("nothing"), "missing tensor 'output_norm.weight'");
        clear();
        assert_eq!(reason("nothing"), "nothing");
    }
}
