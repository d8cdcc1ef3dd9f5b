//! What the targets share: a runtime, a directory in memory, and what every refusal must be like.

use std::cell::OnceCell;
use std::collections::VecDeque;
use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use proto_common::error::{ERROR_DOMAIN, Error};
use tokio::runtime::{Builder, Runtime};
use tonic::Status;
use tonic_types::StatusExt as _;

/// Longest time for one input, by a clock that goes on only where nothing is left to do: a machine that is busy with something else makes nobody late. Far
/// beyond what any takes, and below the idle timeouts, which would hide a hang.
const LIMIT: Duration = Duration::from_secs(20);

/// Names of the last directories. Each has its own, which no input can hold that was made before it: an error that has one has told a path. A name
/// for the whole process would not do, since libFuzzer learns what its inputs are compared with.
static DIRECTORIES: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// As many names as inputs that are tried at once can need, where tests run side by side.
const DIRECTORIES_KEPT: usize = 256;

static PANICS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() };
}

/// Panics so far, of any thread and task: one that a runtime catches is a finding, too.
#[must_use]
pub fn panics() -> usize {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            print(info);
        }));
    });
    PANICS.load(Ordering::SeqCst)
}

/// Runs `work` to its end; panics if that takes long, or if any task that it spawned panicked.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let before = panics();
    let done = RUNTIME.with(|runtime| {
        let runtime = runtime
            .get_or_init(|| Builder::new_current_thread().enable_all().start_paused(true).build().unwrap());
        runtime.block_on(async {
            tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("no end within {LIMIT:?}"))
        })
    });
    assert_eq!(panics(), before, "a task panicked");
    done
}

/// A directory for one input, in memory where that is possible.
pub(crate) fn directory() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let root: PathBuf = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    let name = format!("proto-fuzz-{:016x}", RandomState::new().hash_one("a path"));
    let directory = tempfile::Builder::new().prefix(&name).tempdir_in(root).unwrap();
    let mut directories = directories();
    directories.push_back(name);
    if directories.len() > DIRECTORIES_KEPT {
        directories.pop_front();
    }
    directory
}

fn directories() -> MutexGuard<'static, VecDeque<String>> {
    DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A refusal names its reason itself: without one, the name of the code would stand in for it.
pub(crate) fn refusal(status: Status) -> Error {
    let details = status.check_error_details().unwrap_or_else(|error| panic!("{status:?}: {error}"));
    let info = details.error_info().unwrap_or_else(|| panic!("no reason: {status:?}"));
    assert_eq!(info.domain, ERROR_DOMAIN, "{status:?}");
    let error = Error::from(&status);
    assert_eq!(polite(&error), info.reason);
    error
}

/// A refusal names its reason and none of the server's paths, and cannot rewrite a terminal.
pub(crate) fn polite(error: &Error) -> &str {
    let texts = error
        .violations()
        .iter()
        .flat_map(|violation| [violation.field.as_str(), violation.description.as_str()])
        .chain(error.metadata_map().values().map(String::as_str))
        .chain([error.message()]);
    for text in texts {
        let told = directories().iter().any(|directory| text.contains(directory.as_str()));
        assert!(!told, "a path of the server: {error:?}");
        assert!(!text.chars().any(char::is_control), "a control character: {error:?}");
    }
    let reason = error.reason();
    assert!(
        !reason.is_empty()
            && reason.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_'),
        "{error:?}"
    );
    assert_ne!(reason, "INTERNAL", "{error:?}");
    assert_ne!(reason, "UNKNOWN", "{error:?}");
    reason
}
