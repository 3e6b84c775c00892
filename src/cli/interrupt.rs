//! The signals that ask a program to end.

/// Lets `ask` be called for each signal that asks to end; set once. One that was ignored when the program began stays
/// so: `nohup` and shells mean it.
#[cfg(unix)]
pub fn catch(ask: impl Fn() + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;

    let ignored = ignored();
    let is_heard = |signal: &i32| !is_in(ignored, *signal);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP].iter().filter(|s| is_heard(s)))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(|_| ask()))?;
    Ok(())
}

/// Lets a file that may not grow any more (`ulimit -f`) be an error of its write, as a full disk is, instead of the
/// program's end.
pub fn limits_are_errors() {
    #[cfg(unix)]
    {
        use signal_hook::consts::SIGXFSZ;
        if !is_in(ignored(), SIGXFSZ) {
            // Where that cannot be, it stays as it is.
            let _ = signal_hook::flag::register(SIGXFSZ, std::sync::Arc::default());
        }
    }
}

/// As the other `catch`, by what Windows has for that.
#[cfg(not(unix))]
pub fn catch(ask: impl Fn() + Send + 'static) -> std::io::Result<()> {
    ctrlc::set_handler(ask).map_err(std::io::Error::other)
}

/// The signals that are ignored, a bit for each; none where the system does not tell.
#[cfg(unix)]
fn ignored() -> u64 {
    // proc(5): `SigIgn:\t0000000000001000`.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(unix)]
fn is_in(mask: u64, signal: i32) -> bool {
    u32::try_from(signal - 1).ok().and_then(|n| mask.checked_shr(n)).is_some_and(|rest| rest & 1 == 1)
}
