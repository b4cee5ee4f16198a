//! A folder that appears under its final name complete or not at all.
//!
//! The files are written into a hidden sibling, `.<name>.tmp-<process>-<number>`. [`StagedFolder::commit`] makes sure they
//! have reached the disk (`config.json` last, the folder after it) and renames the sibling, which the file system does in one
//! step; then the parent folder is synced so that the new name survives a power cut. A process that dies in between leaves only
//! the hidden sibling, and the next [`StagedFolder::new`] for the same name removes it.
//!
//! **Replacing a folder.** A rename cannot replace a folder that has files. On Linux the two folders exchange their names in
//! one step, so at every instant the name leads to the old or to the new one. Where the system or the file system cannot
//! do that, the old one is renamed to `.<name>.old-<process>-<number>` first; between the two renames, a few microseconds,
//! the name leads nowhere. A process killed exactly there has lost nothing: the next `new` puts the old folder back.
//!
//! Whether a sibling is still in use is asked twice: its process must be gone, and the lock that its maker holds on it must
//! be free (two containers that share a disk do not see each other's processes, but they do see the lock).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};

/// The file a complete folder always has.
const CONFIG: &str = "config.json";

/// Makes the siblings of one process distinct.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A folder being written. Dropped before [`StagedFolder::commit`], it is removed.
#[derive(Debug)]
pub struct StagedFolder {
    final_path: PathBuf,
    staged: PathBuf,
    overwrite: bool,
    /// Held while the folder is in use; none where folders cannot be locked.
    lock: Option<File>,
    committed: bool,
    /// The process that made it: a forked child's copy must not remove it.
    process: u32,
}

impl StagedFolder {
    /// Makes the hidden sibling of `final_path`, whose parent folder must exist, and removes those that dead processes left.
    ///
    /// If something has the final name already, that is an error unless `overwrite` is set; and even then only a folder that
    /// is empty or has a `config.json` is replaced, so a slip of the pen cannot delete a folder of another kind.
    pub fn new(final_path: impl AsRef<Path>, overwrite: bool) -> Result<Self> {
        let given = final_path.as_ref();
        let Some(name) = given.file_name() else {
            return Err(Error::argument("output folder", "a path that ends with a name", given.display()));
        };
        let parent = parent(given);
        let final_path = parent.join(name); // without a trailing slash or dot
        if !fs::metadata(&parent).map_err(Error::io(&parent))?.is_dir() {
            return Err(Error::io(&parent)(io::ErrorKind::NotADirectory.into()));
        }
        clean(&parent, name, &final_path);
        check_replaceable(&final_path, overwrite)?;
        loop {
            let staged = sibling(&parent, name, "tmp");
            match fs::create_dir(&staged) {
                // A process with this number made it before and died; it was in use by name only.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(&staged)(error)),
                Ok(()) => {
                    let lock = File::open(&staged).ok().filter(|folder| folder.try_lock().is_ok());
                    let process = std::process::id();
                    return Ok(Self { final_path, staged, overwrite, lock, committed: false, process });
                }
            }
        }
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        &self.staged
    }

    /// The folder it will become.
    pub fn final_path(&self) -> &Path {
        &self.final_path
    }

    /// Gives the folder its final name, once everything in it has reached the disk.
    pub fn commit(mut self) -> Result<()> {
        sync_folder(&self.staged, true)?;
        check_replaceable(&self.final_path, self.overwrite)?;
        let parent = parent(&self.final_path);
        if exists(&self.final_path) {
            self.replace(&parent)?;
        } else {
            // Should another process have taken the name in this moment, the rename fails unless what it made is empty.
            fs::rename(&self.staged, &self.final_path).map_err(Error::io(&self.final_path))?;
            self.committed = true;
        }
        sync_path(&parent)
    }

    /// Puts the staged folder in the place of the one under the final name.
    fn replace(&mut self, parent: &Path) -> Result<()> {
        let old = if exchange(&self.staged, &self.final_path) {
            self.committed = true;
            // The new name reaches the disk before the old files leave it.
            sync_path(parent)?;
            self.staged.clone()
        } else {
            let name = self.final_path.file_name().unwrap_or_default();
            let old = sibling(parent, name, "old");
            fs::rename(&self.final_path, &old).map_err(Error::io(&self.final_path))?;
            if let Err(error) = fs::rename(&self.staged, &self.final_path) {
                // If this fails too, the old folder keeps its hidden name and the next `new` restores it.
                let _ = fs::rename(&old, &self.final_path);
                return Err(Error::io(&self.final_path)(error));
            }
            self.committed = true;
            sync_path(parent)?;
            old
        };
        // The new folder is in place: what cannot be removed now is removed by the next `new`.
        let _ = remove(&old);
        Ok(())
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        if !self.committed && self.process == std::process::id() {
            // Nothing can be done about a failure here; the next `new` tries again.
            let _ = remove(&self.staged);
        }
        self.lock = None;
    }
}

/// The folder that holds `path`.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// A hidden name beside the final one.
fn sibling(parent: &Path, name: &OsStr, kind: &str) -> PathBuf {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut hidden = prefix(name, kind);
    hidden.push(format!("{}-{number}", std::process::id()));
    parent.join(hidden)
}

fn prefix(name: &OsStr, kind: &str) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(format!(".{kind}-"));
    prefix
}

/// Whether anything has this name, a dangling link included.
fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn check_replaceable(path: &Path, overwrite: bool) -> Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(path)(error)),
        Ok(kind) => kind,
    };
    let refuse = |text: &str| Err(Error::io(path)(io::Error::new(io::ErrorKind::AlreadyExists, text)));
    if !overwrite {
        return refuse("exists already; choose another name or ask for overwriting");
    }
    if !kind.is_dir() {
        return refuse("exists already and is not a folder");
    }
    let is_empty = fs::read_dir(path).map_err(Error::io(path))?.next().is_none();
    if !is_empty && !exists(&path.join(CONFIG)) {
        return refuse("holds other files and no config.json, so it is not replaced; remove it yourself");
    }
    Ok(())
}

/// Removes what dead processes left beside `final_path`, or puts back a folder that one of them had moved away. A
/// nuisance at worst if it fails, so it does not stop the work at hand.
fn clean(parent: &Path, name: &OsStr, final_path: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let (staged, old) = (prefix(name, "tmp"), prefix(name, "old"));
    for entry in entries.flatten() {
        let (path, hidden) = (entry.path(), entry.file_name());
        let process_of = |prefix: &OsStr| {
            let rest = hidden.to_str()?.strip_prefix(prefix.to_str()?)?;
            let (process, number) = rest.split_once('-')?;
            number.parse::<u32>().ok()?;
            process.parse::<i32>().ok()
        };
        let (process, is_old) = match (process_of(&staged), process_of(&old)) {
            (Some(process), _) => (process, false),
            (None, Some(process)) => (process, true),
            (None, None) => continue,
        };
        if is_alive(process) || is_locked(&path) {
            continue;
        }
        if is_old && !exists(final_path) {
            let _ = fs::rename(&path, final_path);
        } else {
            let _ = remove(&path);
        }
    }
}

/// Whether a process of this number runs; where that cannot be asked, it might.
fn is_alive(process: i32) -> bool {
    #[cfg(unix)]
    if let Some(pid) = rustix::process::Pid::from_raw(process) {
        // Refused permission means that there is one.
        return rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH);
    }
    let _ = process;
    true
}

/// Whether the maker of a staged folder still holds its lock.
fn is_locked(folder: &Path) -> bool {
    match File::open(folder) {
        Ok(folder) => matches!(folder.try_lock(), Err(fs::TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

/// Lets two folders exchange their names in one step, if the system can.
fn exchange(one: &Path, other: &Path) -> bool {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = (one, other);
        false
    }
}

/// Removes a folder with its contents; a link itself, not what it leads to.
fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// Makes the files below `folder` and then the folder itself reach the disk; at the top, `config.json` after the others.
fn sync_folder(folder: &Path, is_top: bool) -> Result<()> {
    let mut config = None;
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io(&path))?;
        if kind.is_dir() {
            sync_folder(&path, false)?;
        } else if is_top && entry.file_name() == CONFIG {
            config = Some(path);
        } else if kind.is_file() {
            sync_path(&path)?;
        }
    }
    if let Some(config) = config {
        sync_path(&config)?;
    }
    sync_path(folder)
}

/// Makes a file's contents, or a folder's names, reach the disk.
fn sync_path(path: &Path) -> Result<()> {
    if cfg!(windows) && path.is_dir() {
        return Ok(()); // folders cannot be opened as files there
    }
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}
