//! Image encoders: from a folder to an image's tokens, embedding and class scores.
//!
//! Opening goes through the same stages as for a language model, and the layers are the same code; see [`super`].

pub mod spec;

mod forward;
mod load;
mod positions;
mod reduce;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::settings::Settings;
use super::validate::validate_weights;
use super::{LoadOptions, layout_bytes};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::kernels::attention::KvType;
use crate::threads::Pool;
use crate::tokens::PatchPolicy;

pub use forward::{Encoding, GONE, MERGED};
pub use spec::EncoderSpec;

/// An open image encoder.
#[derive(Debug)]
pub struct Encoder {
    path: PathBuf,
    spec: EncoderSpec,
    config: Value,
    kv: KvType,
    settings: Settings,
    pool: Pool,
    kernels: Kernels,
    weights: load::Weights,
    /// Calls take turns: the pool's threads serve one at a time anyway.
    memory: Mutex<forward::Memory>,
}

/// Sizes, kernels and memory of an open encoder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EncoderInfo {
    /// The family.
    pub family: String,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads of the first layer.
    pub heads: usize,
    /// Colour channels.
    pub channels: usize,
    /// Height and width of a patch.
    pub patch: [usize; 2],
    /// Height and width of the images the positions were learned for.
    pub image: [usize; 2],
    /// Learned tokens before those of the patches.
    pub learned_tokens: usize,
    /// Width of the embedding.
    pub embedding: usize,
    /// Number of classes; 0 without a classifier.
    pub labels: usize,
    /// Number of weights.
    pub parameters: u64,
    /// Multiplications with additions that such an image takes.
    pub macs: u64,
    /// Bytes of packed weights by layout.
    pub weight_bytes: BTreeMap<String, u64>,
    /// Type in which keys and values are held: `f32`, `f16` or `int8`.
    pub kv_type: String,
    /// The kernel of every operation, as `operation/tier`.
    pub kernels: Vec<String>,
    /// Number of threads.
    pub threads: usize,
}

impl Encoder {
    /// Opens a Hugging Face folder, plain or quantized. The context of the options is a language model's and has no meaning.
    pub fn open(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        crate::cpu::check_environment()?;
        let path = path.as_ref();
        let threads = options.threads.map_or_else(Pool::default_threads, Ok)?;
        let pool = Pool::new(threads)?;
        let checkpoint = Checkpoint::open(path, options.access)?;
        let spec = checkpoint.encoder_spec()?;
        let settings = Settings::read(checkpoint.config())?;
        if settings.tokens.is_some() {
            let detail = "that section says which tokens of a text are left out";
            return Err(Error::unsupported("nybble.run.tokens of an image encoder", detail));
        }
        validate_weights(&spec.inventory(), &checkpoint)?;
        let weights = load::Weights::load(&spec, &checkpoint, &pool)?;
        let kv = options.kv.unwrap_or(if weights.quantized() { KvType::F16 } else { KvType::F32 });
        Ok(Self {
            path: path.to_path_buf(),
            spec,
            config: checkpoint.config().clone(),
            kv,
            settings,
            pool,
            kernels: Kernels::best(),
            weights,
            memory: Mutex::default(),
        })
    }

    /// Encodes images: `pixels` are `[images, channels, height, width]`, already normalised as the model was trained with.
    /// Of another size than the model's own, positions are interpolated. With a policy deeper layers do without some patches.
    /// Between layers `stop` says whether to give up.
    pub fn encode(
        &self,
        pixels: &[f32],
        [images, channels, height, width]: [usize; 4],
        policy: Option<&PatchPolicy>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Encoding> {
        let wrong = |expected: String, found: String| Err(Error::argument("pixel values", expected, found));
        let shape = [images, channels, height, width];
        let product = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        if product != Some(pixels.len()) {
            return wrong(format!("{shape:?} values"), pixels.len().to_string());
        }
        if channels != self.spec.channels {
            return wrong(format!("{} channels", self.spec.channels), channels.to_string());
        }
        let [high, wide] = self.spec.patch;
        let whole = |size: usize, patch: usize| size > 0 && size.is_multiple_of(patch);
        if !whole(height, high) || !whole(width, wide) {
            let expected = format!("height and width that are multiples of the patch, {high} x {wide}");
            return wrong(expected, format!("{height} x {width}"));
        }
        if let Some(policy) = policy {
            policy.check(self.spec.layers.len(), !self.spec.prefix.is_empty())?;
        }
        if images == 0 {
            return Ok(Encoding::default());
        }
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        forward::forward(self, pixels, [height, width], policy, &mut memory, stop)
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// Its configuration.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Sizes, kernels and memory.
    pub fn info(&self) -> EncoderInfo {
        let spec = &self.spec;
        EncoderInfo {
            family: spec.family.into(),
            layers: spec.layers.len(),
            hidden: spec.hidden,
            heads: spec
                .layers
                .iter()
                .filter_map(|layer| Some(layer.attention.as_ref()?.heads))
                .max()
                .unwrap_or(0),
            channels: spec.channels,
            patch: spec.patch,
            image: spec.image,
            learned_tokens: spec.learned(),
            embedding: spec.embedding(),
            labels: spec.labels(),
            parameters: spec.inventory().parameters(),
            macs: spec.macs(spec.image, None),
            weight_bytes: layout_bytes(&self.weights.matrices()),
            kv_type: self.kv.name().into(),
            kernels: self.kernels.names(),
            threads: self.pool.threads(),
        }
    }
}
