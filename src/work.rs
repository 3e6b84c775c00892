//! Work on several threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crate::error::{Error, Result};

/// Most threads, whatever is asked for.
const MOST: usize = 256;

/// A thread, unless the system has none left.
pub fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Option<ScopedJoinHandle<'scope, T>> {
    Builder::new().spawn_scoped(scope, work).ok()
}

/// Does the same work on so many threads at once, this one among them; on fewer where the system has no more.
pub fn together(threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        let _more: Vec<_> = (1..threads.min(MOST)).map_while(|_| spawn(scope, &work)).collect();
        work();
    });
}

/// Makes a buffer `len` long; what is new holds `value`.
///
/// # Errors
/// `Limit` where there is no memory for it.
pub fn resize<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) -> Result<()> {
    let more = len.saturating_sub(buffer.len());
    let lacks = |_| {
        let bytes = len.saturating_mul(size_of::<T>());
        Error::limit(format!("there is no memory for a buffer of {bytes} bytes"))
            .hint("--max-memory and -j make buffers smaller")
    };
    buffer.try_reserve_exact(more).map_err(lacks)?;
    buffer.resize(len, value);
    Ok(())
}

/// What `work` makes of each item, in their order, on at most so many threads, each of which has a `state` of its
/// own. Items are begun in their order.
///
/// # Errors
/// The first that is met; nothing is begun after it.
pub fn each<T: Sync, R: Send, S>(
    items: &[T],
    threads: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let run = || {
        let (mut state, mut done) = (state(), Vec::new());
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(i) else { return done };
            match work(&mut state, item) {
                Ok(result) => done.push((i, result)),
                Err(e) => {
                    next.store(items.len(), Ordering::Relaxed);
                    failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                    return done;
                }
            }
        }
    };
    let mut done = std::thread::scope(|scope| {
        let more: Vec<_> =
            (1..threads.clamp(1, MOST).min(items.len())).map_while(|_| spawn(scope, run)).collect();
        let mut done = run();
        for thread in more {
            match thread.join() {
                Ok(of_thread) => done.extend(of_thread),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    if let Some(e) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(e);
    }
    done.sort_unstable_by_key(|(i, _)| *i);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_are_in_order() {
        let items: Vec<u64> = (0..1000).collect();
        for threads in [0, 1, 3, 9] {
            let squares = each(&items, threads, || 0, |_, n| Ok(n * n)).unwrap();
            assert!(squares.iter().zip(&items).all(|(s, n)| *s == n * n) && squares.len() == 1000);
            let failed = each(
                &items,
                threads,
                || 0,
                |_, n| match n {
                    500 => Err(Error::interrupted()),
                    _ => Ok(()),
                },
            );
            assert_eq!(failed.unwrap_err().kind(), crate::error::ErrorKind::Interrupted);
        }
        assert!(each(&[] as &[u64], 4, || (), |(), _| Ok(())).unwrap().is_empty());
    }
}
