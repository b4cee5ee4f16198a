//! Folders that appear whole or not at all, even when their writer is killed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nybble::format::Access;
use nybble::format::folder::Folder;
use nybble::format::publish::StagedFolder;

use crate::badfiles::{safetensors, write_sharded};

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn write(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).expect("a file");
}

#[test]
fn a_committed_folder_has_its_files_and_nothing_stays_beside_it() {
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("out");
    let staged = StagedFolder::new(&out, false).expect("a new folder");
    assert!(staged.path().file_name().expect("a name").to_string_lossy().starts_with(".out.tmp-"));
    assert_eq!((staged.path().parent(), staged.final_path()), (Some(root.path()), out.as_path()));
    write(staged.path(), "config.json", "{}");
    fs::create_dir(staged.path().join("sub")).expect("a folder");
    write(&staged.path().join("sub"), "file", "x");
    assert!(!out.exists());
    staged.commit().expect("published");
    assert_eq!(names(&out), ["config.json", "sub"]);
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn a_dropped_folder_leaves_nothing() {
    let root = tempfile::tempdir().expect("a folder");
    let staged = StagedFolder::new(root.path().join("out"), false).expect("a new folder");
    write(staged.path(), "config.json", "{}");
    drop(staged);
    assert!(names(root.path()).is_empty());
}

#[test]
fn an_existing_folder_is_replaced_only_when_asked() {
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("out");
    fs::create_dir(&out).expect("a folder");
    write(&out, "config.json", "old");
    write(&out, "only-old", "");
    let error = StagedFolder::new(&out, false).expect_err("it exists").to_string();
    assert_eq!(
        error,
        format!("{}: exists already; choose another name or ask for overwriting", out.display())
    );
    let staged = StagedFolder::new(&out, true).expect("a staged folder");
    write(staged.path(), "config.json", "new");
    assert_eq!(fs::read_to_string(out.join("config.json")).expect("a file"), "old");
    staged.commit().expect("published");
    assert_eq!(names(&out), ["config.json"]);
    assert_eq!(fs::read_to_string(out.join("config.json")).expect("a file"), "new");
    assert_eq!(names(root.path()), ["out"]);

    // Something appeared meanwhile.
    let late = root.path().join("late");
    let staged = StagedFolder::new(&late, false).expect("a staged folder");
    fs::create_dir(&late).expect("a folder");
    write(&late, "config.json", "theirs");
    assert!(staged.commit().is_err());
    assert_eq!(fs::read_to_string(late.join("config.json")).expect("a file"), "theirs");
    assert_eq!(names(root.path()), ["late", "out"]);
}

#[test]
fn what_is_no_model_folder_is_never_replaced() {
    let root = tempfile::tempdir().expect("a folder");
    let home = root.path().join("home");
    fs::create_dir(&home).expect("a folder");
    write(&home, "letters", "dear");
    let error = StagedFolder::new(&home, true).expect_err("not a model").to_string();
    assert!(error.contains("holds other files and no config.json"), "{error}");
    let file = root.path().join("file");
    write(root.path(), "file", "text");
    let error = StagedFolder::new(&file, true).expect_err("a file").to_string();
    assert!(error.contains("exists already and is not a folder"), "{error}");
    // An empty one may be.
    let empty = root.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    let staged = StagedFolder::new(root.path().join("empty/"), true).expect("a staged folder");
    write(staged.path(), "config.json", "{}");
    staged.commit().expect("published");
    assert_eq!(names(root.path()), ["empty", "file", "home"]);
}

#[test]
fn errors_name_the_path() {
    let root = tempfile::tempdir().expect("a folder");
    let error = StagedFolder::new(root.path().join("none/out"), false).expect_err("no parent").to_string();
    assert!(error.starts_with(&root.path().join("none").display().to_string()), "{error}");
    write(root.path(), "file", "");
    assert!(StagedFolder::new(root.path().join("file/out"), false).is_err());
    for odd in ["/", "..", ""] {
        let error = StagedFolder::new(odd, false).expect_err("no name").to_string();
        assert!(error.starts_with("output folder: expected a path that ends with a name"), "{error}");
    }
}

/// A process number that no process has.
fn dead_process() -> u32 {
    let mut child = Command::new("true").spawn().expect("a process");
    let process = child.id();
    child.wait().expect("it ends");
    process
}

#[cfg(unix)]
#[test]
fn leftovers_of_dead_processes_are_removed() {
    let root = tempfile::tempdir().expect("a folder");
    let (dead, alive) = (dead_process(), std::process::id());
    let make = |name: &str| {
        fs::create_dir(root.path().join(name)).expect("a folder");
        write(&root.path().join(name), "half", "");
    };
    let kept = [
        format!(".out.tmp-{alive}-99"),
        format!(".other.tmp-{dead}-0"),
        ".out.tmp-x-0".into(),
        format!(".out.tmp-{dead}"),
    ];
    for name in &kept {
        make(name);
    }
    make(&format!(".out.tmp-{dead}-0"));
    make(&format!(".out.tmp-{dead}-7"));
    // In use although no such process is seen here, as from another container.
    let locked = format!(".out.tmp-{dead}-8");
    make(&locked);
    let lock = fs::File::open(root.path().join(&locked)).expect("a folder");
    lock.try_lock().expect("nobody has it");

    let out = root.path().join("out");
    drop(StagedFolder::new(&out, false).expect("a staged folder"));
    let mut expected: Vec<String> = kept.into_iter().chain([locked.clone()]).collect();
    expected.sort();
    assert_eq!(names(root.path()), expected);
    // Closing it would not do: a process that another test starts at this moment has it open too until it runs its program.
    lock.unlock().expect("it was locked");
    drop(StagedFolder::new(&out, false).expect("a staged folder"));
    expected.retain(|name| *name != locked);
    assert_eq!(names(root.path()), expected);
}

#[cfg(unix)]
#[test]
fn a_folder_moved_away_by_a_killed_process_comes_back() {
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("out");
    let old = root.path().join(format!(".out.old-{}-3", dead_process()));
    fs::create_dir(&old).expect("a folder");
    write(&old, "config.json", "old");
    drop(StagedFolder::new(&out, true).expect("a staged folder"));
    assert_eq!(fs::read_to_string(out.join("config.json")).expect("a file"), "old");
    assert_eq!(names(root.path()), ["out"]);
    // And is removed when the new one is there.
    fs::create_dir(&old).expect("a folder");
    drop(StagedFolder::new(&out, true).expect("a staged folder"));
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn a_folder_that_is_open_can_be_replaced() {
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("out");
    fs::create_dir(&out).expect("a folder");
    write_sharded(&out);
    let model = Folder::open(&out, Access::Map).expect("a good folder");
    let staged = StagedFolder::new(&out, true).expect("a staged folder");
    write(staged.path(), "config.json", "{}");
    fs::write(staged.path().join("model.safetensors"), safetensors("{}", &[])).expect("a file");
    staged.commit().expect("published");
    // The mapping keeps the old files alive; whoever opens the folder now sees the new ones.
    assert_eq!(model.bytes("b").expect("there"), [24, 25, 26, 27]);
    model.release("b");
    assert_eq!(model.bytes("b").expect("there"), [24, 25, 26, 27]);
    assert!(Folder::open(&out, Access::Map).expect("a good folder").tensors().is_empty());
}

#[test]
fn a_file_read_into_memory_may_be_truncated() {
    let root = tempfile::tempdir().expect("a folder");
    write_sharded(root.path());
    let model = Folder::open(root.path(), Access::Read).expect("a good folder");
    for name in names(root.path()) {
        fs::File::create(root.path().join(name)).expect("a file"); // truncates
    }
    assert_eq!(model.bytes("b").expect("there"), [24, 25, 26, 27]);
}

const CHILD: &str = "NYBBLE_TEST_PUBLISH";
const FILES: usize = 6;

/// Not a test by itself: the child of the next one, which publishes one folder after the other until it is killed.
#[test]
fn child_that_publishes() {
    let Some(out) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    eprintln!("ready");
    for version in 0.. {
        let staged = StagedFolder::new(&out, true).expect("a staged folder");
        for file in 0..FILES {
            write(staged.path(), &format!("file-{file}"), &format!("{version} {file}").repeat(2000));
        }
        write(staged.path(), "config.json", &version.to_string());
        staged.commit().expect("published");
    }
}

/// The version of a complete folder; panics if it is anything else.
fn complete_version(out: &Path) -> String {
    let version = fs::read_to_string(out.join("config.json")).expect("the last file of a complete folder");
    assert_eq!(names(out).len(), FILES + 1);
    for file in 0..FILES {
        let text = fs::read_to_string(out.join(format!("file-{file}"))).expect("a file of a complete folder");
        assert_eq!(text, format!("{version} {file}").repeat(2000));
    }
    version
}

#[cfg(unix)]
#[test]
fn killed_at_any_time_it_leaves_a_whole_folder_or_none() {
    let me = std::env::current_exe().expect("the path of this test");
    let root = tempfile::tempdir().expect("a folder");
    let mut random = 0x2545_f491_4f6c_dd1d_u64 ^ u64::from(std::process::id());
    let (mut absent, mut present) = (0, 0);
    for round in 0..40 {
        // A new name in some rounds, so that the first commit, which has nothing to replace, is hit as well.
        let out = root.path().join(format!("out{}", round / 4));
        let mut child = Command::new(&me)
            .args(["--exact", "publish::child_that_publishes", "--nocapture"])
            .env(CHILD, &out)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a child process");
        let mut line = String::new();
        let errors = child.stderr.take().expect("piped");
        BufReader::new(errors).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let delay = Duration::from_micros(random % 40_000);
        let start = Instant::now();
        let mut seen = false;
        while start.elapsed() < delay {
            // Names are exchanged in one step where the system can, so what was there once is always there.
            let exists = out.exists();
            assert!(exists || !seen || !cfg!(target_os = "linux"), "the folder vanished");
            seen |= exists;
        }
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        if out.exists() {
            complete_version(&out);
            present += 1;
        } else {
            absent += 1;
        }
    }
    eprintln!("{present} killed with a folder in place, {absent} before");
    assert!(present > 0);
    for round in 0..10 {
        drop(StagedFolder::new(root.path().join(format!("out{round}")), true).expect("a staged folder"));
    }
    assert!(names(root.path()).iter().all(|name| name.starts_with("out")), "{:?}", names(root.path()));
}
