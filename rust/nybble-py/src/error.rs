//! The way from Python into the core and back: the GIL, Ctrl-C, panics, and which exception each error becomes.

use std::any::Any;
use std::cell::Cell;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use nybble::Error;
use pyo3::prelude::*;

/// How often a long call looks for a signal.
const POLL: Duration = Duration::from_millis(50);

/// Runs `work` without the GIL.
pub(crate) fn run<T: Send>(py: Python<'_>, work: impl FnOnce() -> nybble::Result<T> + Send) -> PyResult<T> {
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    match outcome {
        Ok(result) => result.map_err(|error| exception(py, &error)),
        Err(payload) => Err(panicked(py, payload.as_ref())),
    }
}

/// Runs `work` without the GIL and hands it a function that says whether to stop because a signal handler raised.
pub(crate) fn run_until_signal<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&dyn Fn() -> bool) -> nybble::Result<T> + Send,
) -> PyResult<T> {
    let raised = Mutex::new(None);
    let result = run(py, || {
        let last = Cell::new(Instant::now());
        let stopped = Cell::new(false);
        work(&|| {
            if stopped.get() || last.get().elapsed() < POLL {
                return stopped.get();
            }
            // Only the main thread runs handlers; on others this is the time of taking the GIL. None means that the
            // interpreter is going down.
            #[allow(clippy::redundant_closure_for_method_calls)] // the method alone is not general enough
            let checked = Python::try_attach(|py| py.check_signals());
            last.set(Instant::now());
            if let Some(Ok(())) = checked {
                return false;
            }
            *raised.lock().unwrap_or_else(PoisonError::into_inner) = checked.and_then(Result::err);
            stopped.set(true);
            true
        })
    });
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => result,
    }
}

/// Runs `work`, which cannot be told to stop, on a thread of its own. When a signal handler raises, its result is not waited
/// for: the thread ends by itself and drops it.
pub(crate) fn run_in_background<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> nybble::Result<T> + Send + 'static,
) -> PyResult<T> {
    let (sender, mut receiver) = mpsc::channel();
    let spawned = thread::Builder::new().name("nybble-open".into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        let _ = sender.send(outcome); // nobody waits any more: the call was interrupted
    });
    spawned.map_err(|error| exception(py, &Error::argument("thread", "room for another one", error)))?;
    loop {
        let receiver = &mut receiver; // a shared borrow may not leave this thread
        match py.detach(move || receiver.recv_timeout(POLL)) {
            Ok(Ok(result)) => return result.map_err(|error| exception(py, &error)),
            Ok(Err(payload)) => return Err(panicked(py, payload.as_ref())),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => return Err(panicked(py, &"a thread was lost")),
        }
    }
}

/// Uses what `shared` guards, for which nobody waits: using it from two threads at once is a mistake in the program.
pub(crate) fn exclusively<S, T>(
    shared: &Mutex<S>,
    name: &str,
    work: impl FnOnce(&mut S) -> nybble::Result<T>,
) -> nybble::Result<T> {
    let mut guard = match shared.try_lock() {
        Ok(guard) => guard,
        // A panic was reported when it happened; the core's types hold no half-made state that could do harm.
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => {
            return Err(Error::argument(name, "to be used by one thread at a time", "a second one"));
        }
    };
    work(&mut guard)
}

/// The Python exception for an error of the core.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => "MissingFileError",
        Error::Io { .. } => "FileError",
        Error::Format { .. } => "FormatError",
        Error::Config { .. } => "ConfigError",
        Error::Unsupported { .. } => "UnsupportedError",
        Error::Argument { .. } => "ArgumentError",
        Error::Token { .. } => "TokenError",
        Error::Context { .. } => "ContextError",
        Error::Layout { .. } => "LayoutError",
        // Only `run_until_signal` interrupts, and it knows the exception that did.
        _ => "NybbleError",
    };
    let Error::Io { path, source } = error else { return make(py, class, (error.to_string(),)) };
    let code = source.raw_os_error().unwrap_or(if source.kind() == ErrorKind::NotFound { 2 } else { 5 });
    let text = source.to_string();
    let text = text.split(" (os error").next().unwrap_or_default().to_string();
    make(py, class, (code, text, path.as_os_str()))
}

/// The exception for a panic, which is a defect of nybble.
fn panicked(py: Python<'_>, payload: &(dyn Any + Send)) -> PyErr {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
    make(py, "NybbleError", (format!("a defect of nybble, please report it: {text}"),))
}

fn make<'py>(py: Python<'py>, class: &str, args: impl pyo3::call::PyCallArgs<'py>) -> PyErr {
    let made = py.import("nybble.errors").and_then(|errors| errors.getattr(class)?.call1(args));
    made.map_or_else(|error| error, PyErr::from_value)
}
