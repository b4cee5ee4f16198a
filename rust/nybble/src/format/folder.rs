//! A Hugging Face folder: `config.json` and the tensors beside it.
//!
//! The tensors are one `model.safetensors`, or several shards named by `model.safetensors.index.json`. The single file
//! wins when both are there, as it does in transformers. A folder without `config.json` is unfinished: [`super::publish`]
//! and other careful writers put that file in last.
//!
//! **Where a name may lead.** The index is the one place where a file's contents choose other files, so it may choose only
//! among the files of its own folder: a plain name, and after all symbolic links are followed still inside the folder. One
//! arrangement of links out of the folder is common and allowed: the cache of the Hugging Face hub, where
//! `models--x/snapshots/<revision>/` is a folder of links into `models--x/blobs/`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::foreign::{is_pickle_name, pickle_error};
use super::index::{Index, file_name_fault};
use super::json;
use super::mapped::{Access, MappedFile};
use super::safetensors::SafeTensors;
use super::tensor::{TensorInfo, quoted};
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open model folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    config: Value,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Folder {
    /// Opens a folder and checks its configuration's syntax, its index and every shard's header against the files present.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref();
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            return Err(Error::format(path, "kind of file", "a model folder", "a file"));
        }
        let config = read_config(path)?;
        let mut folder =
            Self { path: path.to_path_buf(), config, files: Vec::new(), tensors: BTreeMap::new() };
        if let Some(file) = folder.find(SINGLE)? {
            folder.add(SafeTensors::open(file, access)?)?;
        } else if let Some(file) = folder.find(INDEX)? {
            folder.open_shards(&file, access)?;
        } else {
            return Err(folder.no_weights());
        }
        Ok(folder)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The contents of `config.json`: an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The path of `config.json`, for messages about its contents.
    pub fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// The tensors of all shards by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let absent = || Error::format(&self.path, quoted(name), "a tensor of this name", "none");
        self.tensors.get(name).ok_or_else(absent)
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let tensor = self.tensor(name)?;
        Ok(&self.files[tensor.shard].bytes()[tensor.range.clone()])
    }

    /// The file that holds a tensor, for messages.
    pub fn file_of(&self, name: &str) -> Result<&Path> {
        Ok(self.files[self.tensor(name)?.shard].path())
    }

    /// Tells the system that a tensor's bytes are not needed soon ([`MappedFile::release`]).
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensors.get(name) {
            self.files[tensor.shard].release(tensor.range.clone());
        }
    }

    /// Number of files that hold tensors.
    pub fn shards(&self) -> usize {
        self.files.len()
    }

    /// The path of another file of this folder (`generation_config.json`, say), if it is there; a link that leads out of
    /// the folder is an error.
    pub fn find(&self, name: &str) -> Result<Option<PathBuf>> {
        contained(&self.path, name)
    }

    fn open_shards(&mut self, index_path: &Path, access: Access) -> Result<()> {
        let index = Index::read(index_path)?;
        for name in &index.shards {
            let Some(file) = self.find(name)? else {
                let path = self.path.join(name);
                return Err(Error::format(path, "shard", "the file, as the index names it", "no such file"));
            };
            self.add(SafeTensors::open(file, access)?)?;
        }
        for (name, &shard) in &index.tensors {
            let file = self.files[shard].path();
            match self.tensors.get(name) {
                Some(tensor) if tensor.shard == shard => {}
                Some(tensor) => {
                    let found = format!("it in {}", self.files[tensor.shard].path().display());
                    return Err(Error::format(file, quoted(name), "this tensor, as the index says", found));
                }
                None => {
                    return Err(Error::format(file, quoted(name), "this tensor, as the index says", "none"));
                }
            }
        }
        // What the index does not name is not part of the model; transformers saves have no such tensors.
        self.tensors.retain(|name, _| index.tensors.contains_key(name));
        Ok(())
    }

    /// Takes over the tensors of one more file.
    fn add(&mut self, shard: SafeTensors) -> Result<()> {
        let (file, tensors) = shard.into_parts();
        for (name, mut tensor) in tensors {
            if let Some(other) = self.tensors.get(&name) {
                let found = format!("another one in {}", self.files[other.shard].path().display());
                return Err(Error::format(file.path(), quoted(&name), "a tensor in one shard only", found));
            }
            tensor.shard = self.files.len();
            self.tensors.insert(name, tensor);
        }
        self.files.push(file);
        Ok(())
    }

    /// The error for a folder with neither kind of weights, which says what is there instead.
    fn no_weights(&self) -> Error {
        let mut names = Vec::new();
        if let Ok(entries) = std::fs::read_dir(&self.path) {
            names.extend(entries.flatten().map(|entry| entry.file_name()).take(10_000));
        }
        names.sort();
        let pickle = |name: &&std::ffi::OsString| {
            let known = ["pytorch_model", "model", "consolidated", "adapter_model"];
            is_pickle_name(Path::new(name))
                && known.iter().any(|stem| name.to_string_lossy().starts_with(stem))
        };
        if let Some(name) = names.iter().find(pickle) {
            return pickle_error(&self.path.join(name));
        }
        let gguf = names.iter().find(|name| Path::new(name).extension() == Some(OsStr::new("gguf")));
        let found = match gguf {
            Some(name) => format!("neither, but {}: open that file itself", quoted(&name.to_string_lossy())),
            None => "neither".into(),
        };
        Error::format(&self.path, "weights", format!("{SINGLE} or {INDEX}"), found)
    }
}

fn read_config(folder: &Path) -> Result<Value> {
    let Some(path) = contained(folder, CONFIG)? else {
        let found = "none: not a model folder, or one whose writing was interrupted";
        return Err(Error::format(folder, CONFIG, "a file of this name", found));
    };
    let config = json::read(&path, json::CONFIG_BYTES)?;
    if !config.is_object() {
        return Err(Error::format(&path, "text", "a JSON object", "another JSON value"));
    }
    Ok(config)
}

/// The path of the file `name` in `folder`, if it is there. Never one outside: see the module documentation.
pub fn contained(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    if let Some(found) = file_name_fault(name) {
        return Err(Error::format(folder, "file name", "the plain name of a file in the folder", found));
    }
    let path = folder.join(name);
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(&path)(error)),
        Ok(kind) if !kind.is_symlink() => return Ok(Some(path)),
        Ok(_) => {}
    }
    let target = path.canonicalize().map_err(Error::io(&path))?;
    let root = folder.canonicalize().map_err(Error::io(folder))?;
    let inside = |root: &Path| target.starts_with(root);
    if inside(&root) || hub_blobs(&root).is_some_and(|blobs| inside(&blobs)) {
        return Ok(Some(path));
    }
    let expected = "a file inside the folder (or its hub cache)";
    Err(Error::format(&path, "symbolic link", expected, target.display().to_string()))
}

/// For `<repository>/snapshots/<revision>`: `<repository>/blobs`, if that is a real folder and no link itself.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent()?;
    if snapshots.file_name()? != "snapshots" {
        return None;
    }
    let blobs = snapshots.parent()?.join("blobs");
    let is_folder = std::fs::symlink_metadata(&blobs).is_ok_and(|kind| kind.is_dir());
    is_folder.then_some(blobs)
}
