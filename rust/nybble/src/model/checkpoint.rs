//! A model's files as named tensors and a configuration, whichever format they are in.
//!
//! Tensors go by the names transformers gives them and have its shapes. A folder has them already, up to a prefix that a
//! bare or a multimodal model lacks or adds. A GGUF file is translated by its family ([`super::arch::gguf`]): names,
//! configuration, and where the converter changed the order of rows, exchanged rows and columns, or added one to norms, that
//! is undone while reading.
//!
//! Nothing is copied when a checkpoint is opened, and reading is by rows, so a model larger than memory can be walked.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::arch::gguf::{Metadata, Transform, shown};
use super::arch::{self, Arch};
use super::encoder::EncoderSpec;
use super::load::reorder;
use super::quantization::Quantization;
use super::spec::{LayerSpec, LinearSpec, Position, Spec};
use super::structure;
use crate::error::{Error, Result};
use crate::format::dtype::dequantize;
use crate::format::folder::Folder;
use crate::format::gguf::Gguf;
use crate::format::{Access, Dtype};
use crate::threads::Pool;

/// 16-bit floats, low byte first.
pub(super) type Halves<'a> = Cow<'a, [[u8; 2]]>;

/// An open model folder or GGUF file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    source: Source,
    arch: &'static Arch,
    config: Value,
    tensors: BTreeMap<String, Tensor>,
    quantization: Option<Quantization>,
}

#[derive(Debug)]
enum Source {
    Folder(Folder),
    Gguf(Gguf),
}

/// One tensor.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Type of the stored elements.
    pub dtype: Dtype,
    /// Shape under its Hugging Face name, last dimension contiguous.
    pub shape: Vec<usize>,
    /// Name in the file.
    pub stored: String,
    transform: Transform,
}

impl Tensor {
    /// Rows and columns; a vector has one column, and further dimensions count as rows.
    pub fn matrix(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [] => (1, 1),
            [len] => (*len, 1),
            [rows @ .., cols] => (rows.iter().product(), *cols),
        }
    }

    /// Whether a linear's weight has to be transposed to be `[rows, cols]`.
    pub(super) fn exchanged(&self, linear: &LinearSpec) -> bool {
        linear.transposed != (self.transform == Transform::Transposed)
    }

    /// Row `row` of `cols` values out of the stored `bytes`.
    fn row(&self, bytes: &[u8], row: usize, cols: usize, out: &mut [f32]) -> Result<()> {
        let row = match &self.transform {
            Transform::Rows(map) => map[row] as usize,
            _ => row,
        };
        let row_bytes = self.dtype.row_bytes(cols).unwrap_or(0);
        dequantize(self.dtype, &bytes[row * row_bytes..][..row_bytes], out)?;
        if self.transform == Transform::MinusOne {
            for value in out {
                *value -= 1.0;
            }
        }
        Ok(())
    }
}

impl Checkpoint {
    /// Opens a Hugging Face folder, or a file ending in `.gguf`.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref();
        if std::fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            return Self::from_folder(Folder::open(path, access)?);
        }
        // Anything else that is a file goes to the GGUF reader, which knows the usual wrong ones and says so.
        Self::from_gguf(Gguf::open(path, access)?)
    }

    fn from_folder(folder: Folder) -> Result<Self> {
        let file = folder.config_path();
        let config = text_config(folder.config());
        let arch = arch::find(&config).map_err(|error| in_file(error, &file))?;
        let mut tensors = BTreeMap::new();
        for (stored, info) in folder.tensors() {
            let tensor = Tensor {
                dtype: info.dtype,
                shape: info.shape.clone(),
                stored: stored.clone(),
                transform: Transform::None,
            };
            let name = arch.canonical(stored);
            if let Some(other) = tensors.insert(name, tensor) {
                let Tensor { stored: other, .. } = other;
                let found = format!("{} as well", shown(&other));
                return Err(Error::format(
                    folder.path(),
                    shown(stored),
                    "one spelling of a tensor's name",
                    found,
                ));
            }
        }
        let quantization = Quantization::read(&config).map_err(|error| in_file(error, &file))?;
        let path = folder.path().to_path_buf();
        Ok(Self { path, source: Source::Folder(folder), arch, config, tensors, quantization })
    }

    fn from_gguf(gguf: Gguf) -> Result<Self> {
        let (arch, gguf_arch) = arch::gguf::find(&gguf)?;
        let path = gguf.path().to_path_buf();
        let config = Value::Object((gguf_arch.config)(&Metadata::new(&gguf, gguf_arch.name))?);
        let spec = arch.decoder(&config).map_err(|error| in_file(error, &path))?;
        let mut tensors = BTreeMap::new();
        for (stored, info) in gguf.tensors() {
            let Some(name) = gguf_arch.hf_name(stored) else { continue };
            // A row map has an entry a row; rows are bounded by the file's bytes.
            let transform = match info.shape.as_slice() {
                [rows] | [rows, _] => (gguf_arch.transform)(&name, *rows, &spec),
                _ => Transform::None,
            };
            let mut shape = info.shape.clone();
            if transform == Transform::Transposed {
                shape.reverse();
            }
            tensors.insert(name, Tensor { dtype: info.dtype, shape, stored: stored.clone(), transform });
        }
        Ok(Self { path, source: Source::Gguf(gguf), arch, config, tensors, quantization: None })
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file its configuration comes from, for messages.
    pub fn config_file(&self) -> PathBuf {
        match &self.source {
            Source::Folder(folder) => folder.config_path(),
            Source::Gguf(_) => self.path.clone(),
        }
    }

    /// The configuration as transformers writes it. That of a multimodal model is its text model's; that of a GGUF file is
    /// rebuilt from its metadata.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The family.
    pub fn arch(&self) -> &'static Arch {
        self.arch
    }

    /// The specification; no size in it has been compared with the tensors yet.
    pub fn spec(&self) -> Result<Spec> {
        let spec = || {
            let mut spec = self.arch.decoder(&self.config)?;
            let alibi = spec.position == Position::Alibi;
            structure::apply(&self.config, &mut spec.layers, alibi)?;
            Ok(spec)
        };
        spec().map_err(|error| in_file(error, &self.config_file()))
    }

    /// The specification of an image encoder; no size in it has been compared with the tensors yet.
    pub fn encoder_spec(&self) -> Result<EncoderSpec> {
        let spec = || {
            let mut spec = self.arch.encoder(&self.config)?;
            structure::apply(&self.config, &mut spec.layers, false)?;
            let whole = |layer: &LayerSpec| layer.attention.is_some() && layer.mlp.is_some();
            if let Some(index) = spec.layers.iter().position(|layer| !whole(layer)) {
                return Err(Error::unsupported(
                    format!("layer {index} of an image encoder without attention or neurons"),
                    "each has some of both",
                ));
            }
            Ok(spec)
        };
        spec().map_err(|error| in_file(error, &self.config_file()))
    }

    /// How it is quantized, for a compressed folder.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }

    /// All tensors by their Hugging Face names.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::Folder(_) => None,
        }
    }

    /// The folder, if it is one.
    pub fn folder(&self) -> Option<&Folder> {
        match &self.source {
            Source::Folder(folder) => Some(folder),
            Source::Gguf(_) => None,
        }
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let absent = || Error::format(&self.path, shown(name), "a tensor of this name", "none");
        self.tensors.get(name).ok_or_else(absent)
    }

    /// The stored bytes of a tensor, if they are in the order of its shape; none when reading has to change them.
    pub fn raw(&self, name: &str) -> Result<Option<&[u8]>> {
        let tensor = self.tensor(name)?;
        if tensor.transform == Transform::None { self.stored(tensor).map(Some) } else { Ok(None) }
    }

    /// Tells the system that a tensor's bytes are not needed soon.
    pub fn release(&self, name: &str) {
        let Some(tensor) = self.tensors.get(name) else { return };
        match &self.source {
            Source::Folder(folder) => folder.release(&tensor.stored),
            Source::Gguf(gguf) => gguf.release(&tensor.stored),
        }
    }

    fn stored(&self, tensor: &Tensor) -> Result<&[u8]> {
        match &self.source {
            Source::Folder(folder) => folder.bytes(&tensor.stored),
            Source::Gguf(gguf) => gguf.bytes(&tensor.stored),
        }
    }

    /// Replaces `out` with rows `rows` of a tensor as f32; of a vector, with those elements.
    pub fn read_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let tensor = self.tensor(name)?;
        self.read(name, tensor, rows, tensor.transform == Transform::Transposed, out)
    }

    /// Replaces `out` with outputs `rows` of a linear's plain weight, `[rows, cols]`, however it is stored.
    pub fn read_linear(&self, linear: &LinearSpec, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let name = linear.weight();
        let tensor = self.tensor(&name)?;
        self.read(&name, tensor, rows, tensor.exchanged(linear), out)
    }

    /// All of a linear's weight, or of a table's, as 16-bit floats in rows, low byte first; none when it is stored
    /// otherwise. The file's own bytes where it has them in this order.
    pub(super) fn halves(&self, name: &str, exchanged: bool) -> Result<Option<(Dtype, Halves<'_>)>> {
        let tensor = self.tensor(name)?;
        let half = matches!(tensor.dtype, Dtype::F16 | Dtype::Bf16);
        if !half || tensor.shape.len() != 2 || tensor.transform == Transform::MinusOne {
            return Ok(None);
        }
        let stored = self.stored(tensor)?.as_chunks::<2>().0;
        let values = match &tensor.transform {
            Transform::Rows(map) => {
                reorder(Cow::Borrowed(stored), stored.len() / map.len().max(1), Some(map))
            }
            // Only plain files of GPT-2 are stored the other way round from what is wanted.
            _ if exchanged => {
                let (rows, cols) = tensor.matrix();
                (0..cols)
                    .flat_map(|col| (0..rows).map(move |row| (row, col)))
                    .map(|(r, c)| stored[r * cols + c])
                    .collect()
            }
            _ => Cow::Borrowed(stored),
        };
        Ok(Some((tensor.dtype, values)))
    }

    /// [`Checkpoint::read_linear`] of all rows, on the pool's threads.
    pub(super) fn read_all(&self, name: &str, exchanged: bool, cols: usize, pool: &Pool) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let elements: usize = tensor.shape.iter().product();
        let mut out = Vec::new();
        if exchanged || tensor.shape.len() != 2 || cols == 0 {
            let rows = elements.checked_div(cols).unwrap_or(0);
            self.read(name, tensor, 0..rows, exchanged, &mut out)?;
            return Ok(out);
        }
        reserve(name, &mut out, elements)?;
        let bytes = self.stored(tensor)?;
        let failed = std::sync::Mutex::new(None);
        pool.split_rows(&mut out, cols, &|first, rows| {
            for (i, row) in rows.chunks_exact_mut(cols).enumerate() {
                if let Err(error) = tensor.row(bytes, first + i, cols, row) {
                    *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        });
        match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(out),
        }
    }

    /// Rows of a tensor; `exchanged` when the rows wanted are the columns of what is stored.
    fn read(
        &self,
        name: &str,
        tensor: &Tensor,
        rows: Range<usize>,
        exchanged: bool,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        if !tensor.dtype.is_float() {
            return Err(Error::format(&self.path, shown(name), "a float tensor", tensor.dtype.name()));
        }
        let bytes = self.stored(tensor)?;
        // `matrix` is about the shape under the Hugging Face name; what is stored may be its transpose.
        let (mut stored_rows, mut stored_cols) = tensor.matrix();
        if tensor.transform == Transform::Transposed {
            (stored_rows, stored_cols) = (stored_cols, stored_rows);
        }
        let (all, cols) = if exchanged { (stored_cols, stored_rows) } else { (stored_rows, stored_cols) };
        if rows.start > rows.end || rows.end > all {
            return Err(Error::argument("rows", format!("a range within 0..{all}"), format!("{rows:?}")));
        }
        reserve(name, out, rows.len() * cols)?;
        if exchanged {
            let mut line = vec![0.0; stored_cols];
            for k in 0..stored_rows {
                tensor.row(bytes, k, stored_cols, &mut line)?;
                for (row, value) in rows.clone().enumerate() {
                    out[row * cols + k] = line[value];
                }
            }
        } else if tensor.shape.len() == 1 && tensor.dtype.is_quantized() {
            // Blocks run along the vector.
            let mut whole = vec![0.0; stored_rows];
            dequantize(tensor.dtype, bytes, &mut whole)?;
            out.copy_from_slice(&whole[rows]);
        } else {
            for (i, row) in rows.enumerate() {
                tensor.row(bytes, row, cols, &mut out[i * cols..][..cols])?;
            }
        }
        Ok(())
    }
}

/// Makes `out` that many zeros. Sizes were compared with the file, but four bytes an element may still be too much.
fn reserve(name: &str, out: &mut Vec<f32>, len: usize) -> Result<()> {
    out.clear();
    if out.try_reserve_exact(len).is_err() {
        return Err(Error::argument(
            shown(name),
            "a tensor that fits into memory",
            format!("{len} elements"),
        ));
    }
    out.resize(len, 0.0);
    Ok(())
}

/// Puts the file's path into a configuration error made without it.
fn in_file(error: Error, file: &Path) -> Error {
    match error {
        Error::Config { problems, .. } => Error::Config { file: file.display().to_string(), problems },
        Error::Format { item, expected, found, .. } => {
            Error::Format { file: file.display().to_string(), item, expected, found }
        }
        other => other,
    }
}

/// The configuration of the text model inside a multimodal one; any other is returned as it is.
fn text_config(config: &Value) -> Value {
    let inner = config.get("text_config").and_then(Value::as_object);
    let (Some("gemma3"), Some(inner)) = (config.get("model_type").and_then(Value::as_str), inner) else {
        return config.clone();
    };
    let mut text = inner.clone();
    text.insert("model_type".into(), json!("gemma3_text"));
    text.insert("architectures".into(), json!(["Gemma3ForCausalLM"]));
    for key in [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "tie_word_embeddings",
        "quantization_config",
        "nybble",
        "transformers_version",
    ] {
        if let Some(value) = config.get(key) {
            text.entry(key).or_insert_with(|| value.clone());
        }
    }
    Value::Object(text)
}
