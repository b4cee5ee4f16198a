//! Models: from a folder or a GGUF file to logits.
//!
//! Opening goes through four stages, each with one job. [`checkpoint`] presents a Hugging Face folder or a GGUF file as named
//! tensors and a configuration. [`arch`] turns the configuration into a [`Spec`]. [`validate`] holds the specification
//! against the tensors, finding every contradiction before anything is allocated from a number in a file. The loader packs
//! the weights. A [`Model`] is then immutable and may be shared by threads; a [`Session`] is one text in it, with its keys
//! and values.
//!
//! The forward pass is one function for all families that write text, in `decoder.rs`. Those that read images are an
//! [`Encoder`], in `encoder/`: the same layers, over all patches of an image at once.

#![forbid(unsafe_code)]

pub mod arch;
pub mod checkpoint;
pub mod encoder;
pub mod info;
pub mod quantization;
pub mod rope;
pub mod settings;
pub mod sparsity;
pub mod spec;
pub mod structure;
pub mod validate;

mod blocks;
mod config;
mod decoder;
mod linear;
mod load;
mod reduce;
mod session;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::format::Access;
use crate::format::folder::Folder;
use crate::kernels::Kernels;
use crate::kernels::attention::KvType;
use crate::threads::Pool;
use crate::tokens::Policy;

pub use checkpoint::Checkpoint;
pub use encoder::Encoder;
pub use info::Info;
use info::layout_bytes;
pub use session::{Logits, PART, Session};
pub use settings::Settings;
pub use sparsity::Sparsity;
use sparsity::{LayerThresholds, Measured};
pub use spec::Spec;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// How to open a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// Threads; none means `NYBBLE_THREADS` or the CPUs there are.
    pub threads: Option<usize>,
    /// Map the files or read them.
    pub access: Access,
    /// Type of cached keys and values; none means f32 for float weights and f16 for quantized ones.
    pub kv: Option<KvType>,
    /// Most tokens of a session, not above the model's own context.
    pub context: Option<usize>,
}

/// An open model.
#[derive(Debug)]
pub struct Model {
    /// Tells models apart, so that a session is never used with another one.
    id: u64,
    path: PathBuf,
    spec: Spec,
    config: Value,
    context: usize,
    kv: KvType,
    settings: Settings,
    /// The settings' token policy, made to fit.
    plan: Option<Arc<reduce::Plan>>,
    /// What is taken for zero, if the folder says so.
    sparsity: Option<Arc<Sparsity>>,
    pool: Pool,
    kernels: Kernels,
    weights: load::Weights,
}

impl Model {
    /// Opens a Hugging Face folder, plain or quantized, or a GGUF file.
    pub fn open(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        crate::cpu::check_environment()?;
        let path = path.as_ref();
        let threads = options.threads.map_or_else(Pool::default_threads, Ok)?;
        let pool = Pool::new(threads)?;
        let checkpoint = Checkpoint::open(path, options.access)?;
        let spec = checkpoint.spec()?;
        let settings = Settings::read(checkpoint.config())?;
        if settings.attention_codes {
            let detail = "codes are multiplied in image encoders alone";
            return Err(Error::unsupported("nybble.run.attention of a language model", detail));
        }
        let context = match options.context {
            None => spec.context,
            Some(context) if (1..=spec.context).contains(&context) => context,
            Some(context) => {
                return Err(Error::argument("context", format!("1 to {}", spec.context), context));
            }
        };
        validate::validate(&spec, &checkpoint)?;
        let weights = load::Weights::load(&spec, &checkpoint, &pool)?;
        let kv = options.kv.unwrap_or(if weights.quantized() { KvType::F16 } else { KvType::F32 });
        let sparsity = match (settings.sparse, checkpoint.folder()) {
            (true, Some(folder)) => Some(read_sparsity(folder, &spec)?),
            _ => None,
        };
        let tokens = settings.tokens.clone();
        let model = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            path: path.to_path_buf(),
            spec,
            config: checkpoint.config().clone(),
            context,
            kv,
            settings,
            plan: None,
            sparsity: sparsity.map(Arc::new),
            pool,
            kernels: Kernels::best(),
            weights,
        };
        model.with_tokens(tokens)
    }

    /// The same model with another policy of token reduction in the place of its folder's, or with none.
    pub fn with_tokens(mut self, policy: Option<Policy>) -> Result<Self> {
        self.plan = self.plan_of(policy.clone())?;
        self.settings.tokens = policy;
        Ok(self)
    }

    fn plan_of(&self, policy: Option<Policy>) -> Result<Option<Arc<reduce::Plan>>> {
        let plan = policy.map(|policy| reduce::Plan::new(policy, &self.spec, &self.weights, self.context));
        Ok(plan.transpose()?.map(Arc::new))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Its configuration; for a GGUF file the one rebuilt from its metadata.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// How it is run.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Most tokens a session holds.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The kernels that run it.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The threads that run it.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// A new, empty session.
    pub fn session(&self) -> Session {
        Session::new(self, self.plan.clone(), self.sparsity.clone())
    }

    /// What is taken for zero in sessions that say nothing else.
    pub fn sparsity(&self) -> Option<&Arc<Sparsity>> {
        self.sparsity.as_ref()
    }

    /// Thresholds of activation sparsity that fit this model, for [`Model::session_with`].
    pub fn sparsity_of(&self, thresholds: Vec<LayerThresholds>) -> Result<Arc<Sparsity>> {
        Sparsity::new(thresholds, &self.spec).map(Arc::new)
    }

    /// Finds out where skipping what is taken for zero saves time (see [`Sparsity`]): measures, or uses `known` times. Returns the
    /// times; none where there is nothing to skip. What was found once stays.
    pub fn probe_sparsity<'a>(
        &self,
        sparsity: &'a Sparsity,
        known: Option<Measured>,
    ) -> Result<Option<&'a Measured>> {
        if sparsity.thresholds().len() != self.spec.layers.len() {
            return Err(Error::argument("sparsity", "that of this model", "that of another"));
        }
        sparsity.probe(self, known)
    }

    fn run(&self) -> linear::Run<'_> {
        linear::Run { pool: &self.pool, kernels: &self.kernels, settings: &self.settings }
    }

    /// A new, empty session with a policy of token reduction of its own, or none, and so with what it takes for zero.
    pub fn session_with(&self, policy: Option<Policy>, sparsity: Option<Arc<Sparsity>>) -> Result<Session> {
        if sparsity.as_ref().is_some_and(|own| own.thresholds().len() != self.spec.layers.len()) {
            return Err(Error::argument("sparsity", "that of this model", "that of another"));
        }
        Ok(Session::new(self, self.plan_of(policy)?, sparsity))
    }

    /// Sizes, kernels and memory.
    pub fn info(&self) -> Info {
        info::info(self)
    }
}

/// The thresholds beside the weights.
fn read_sparsity(folder: &Folder, spec: &Spec) -> Result<Sparsity> {
    let Some(file) = folder.find(sparsity::FILE)? else {
        let found = "none, but the configuration says that there are thresholds of activation sparsity";
        return Err(Error::format(folder.path(), sparsity::FILE, "a file of this name", found));
    };
    let thresholds = sparsity::read(&file, spec.layers.len())?;
    Sparsity::new(thresholds, spec).map_err(|error| match error {
        Error::Argument { name, expected, found } => Error::format(&file, name, expected, found),
        error => error,
    })
}
