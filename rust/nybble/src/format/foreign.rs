//! Recognises files that are not what their place suggests, to say so plainly.

use std::ffi::OsStr;
use std::path::Path;

use super::tensor::quoted;
use crate::error::{Error, Result};

/// Extensions of formats that are, or wrap, Python pickles.
const PICKLE_EXTENSIONS: [&str; 8] = ["bin", "pt", "pth", "pkl", "pickle", "ckpt", "th", "joblib"];

/// Whether the name is that of a pickle checkpoint.
pub(crate) fn is_pickle_name(path: &Path) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| PICKLE_EXTENSIONS.iter().any(|known| known.eq_ignore_ascii_case(extension)))
}

/// Refuses pickles, by name and by contents: reading one can run code that its maker chose.
pub(crate) fn pickle_error(path: &Path) -> Error {
    Error::unsupported(
        format!("{}: a pickle checkpoint", path.display()),
        "it could run code while being read, in \"safe\" modes too, so only safetensors and GGUF are read. Convert it where \
         you trust it, for example with transformers: \
         AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, safe_serialization=True)",
    )
}

/// Refuses what is certainly no tensor file: pickles, a Git LFS pointer, a saved web page, nothing at all.
pub(crate) fn refuse_foreign(path: &Path, bytes: &[u8], expected: &str) -> Result<()> {
    // A pickle starts with its protocol, and so may a safetensors header of 640 bytes: that one goes on with the zeros of a
    // length below 2^32 and an opening brace.
    let pickled = matches!(bytes, [0x80, 2..=5, _, _, rest @ ..] if !matches!(rest, [0, 0, 0, 0] | [0, 0, 0, 0, b'{', ..]));
    // "PK" starts a zip archive, which is what newer pickle checkpoints are.
    if is_pickle_name(path) || pickled || bytes.starts_with(b"PK\x03\x04") {
        return Err(pickle_error(path));
    }
    let refuse = |found: String| Err(Error::format(path, "contents", expected, found));
    if bytes.is_empty() {
        return refuse("an empty file".into());
    }
    if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        return refuse(format!(
            "a Git LFS pointer of {} bytes: the real file was never downloaded; run `git lfs pull` in its folder",
            bytes.len()
        ));
    }
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]);
    let text = start.trim_start().to_ascii_lowercase();
    if text.starts_with("<!doctype") || text.starts_with("<html") || text.starts_with("<?xml") {
        return refuse(format!("a web page, probably an error saved by a download: {}", quoted(&start)));
    }
    Ok(())
}
