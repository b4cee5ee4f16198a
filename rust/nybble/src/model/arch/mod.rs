//! The families: one file each, mapping `config.json`, weight names and GGUF files to a [`Spec`].
//!
//! A family is an [`Arch`]: the `model_type` names it goes by, how its configuration becomes a [`Spec`] or, for those that
//! read images, an [`EncoderSpec`], which spellings of
//! its weight names are the same, and, where llama.cpp knows the family, how a GGUF file reads as a Hugging Face folder.
//! [`ARCHS`] is the one list; adding a family is one file and one line.

mod bloom;
mod clip;
mod dinov2;
mod gated;
mod gemma3;
pub mod gguf;
mod gpt2;
mod llama;
mod opt;
mod qwen2;
mod qwen3;
mod vision;
mod vit;

use serde_json::Value;

use super::encoder::EncoderSpec;
use super::spec::Spec;
use crate::error::{Error, Result};
use gguf::GgufArch;

/// One family.
#[derive(Debug)]
pub struct Arch {
    /// Its name here.
    pub family: &'static str,
    /// Values of `model_type` that mean it.
    pub model_types: &'static [&'static str],
    /// Its configuration as data.
    pub spec: Builder,
    /// Other beginnings of weight names and what they stand for; the first that fits is replaced.
    pub prefixes: &'static [(&'static str, &'static str)],
    /// How to read its GGUF files.
    pub gguf: Option<&'static GgufArch>,
}

/// How a configuration becomes data, by what the family does.
#[derive(Debug, Clone, Copy)]
pub enum Builder {
    /// It writes text.
    Decoder(fn(&Value) -> Result<Spec>),
    /// It reads images.
    Encoder(fn(&Value) -> Result<EncoderSpec>),
}

/// All families.
pub static ARCHS: &[&Arch] = &[
    &llama::ARCH,
    &llama::DECI,
    &qwen2::ARCH,
    &qwen3::ARCH,
    &gemma3::ARCH,
    &opt::ARCH,
    &bloom::ARCH,
    &gpt2::ARCH,
    &vit::ARCH,
    &dinov2::ARCH,
    &clip::CLIP,
    &clip::SIGLIP,
];

/// The values of `model_type` that are read.
pub fn model_types() -> Vec<&'static str> {
    ARCHS.iter().flat_map(|arch| arch.model_types).copied().collect()
}

/// The family a configuration belongs to.
pub fn find(config: &Value) -> Result<&'static Arch> {
    let name = match config.get("model_type") {
        Some(Value::String(name)) => name,
        other => {
            let found = other.map_or_else(|| "nothing".into(), super::config::brief);
            return Err(Error::Config {
                file: "config.json".into(),
                problems: vec![format!(
                    "model_type: expected one of {}, found {found}",
                    model_types().join(", ")
                )],
            });
        }
    };
    ARCHS.iter().find(|arch| arch.model_types.contains(&name.as_str())).copied().ok_or_else(|| {
        let shown: String = name.chars().filter(|c| !c.is_control()).take(60).collect();
        Error::unsupported(
            format!("model_type {shown:?}"),
            format!("the families read are {}", model_types().join(", ")),
        )
    })
}

/// The specification of a configuration, whichever family of decoders it is of.
pub fn spec(config: &Value) -> Result<Spec> {
    find(config)?.decoder(config)
}

/// The values of `model_type` that mean an image encoder.
pub fn encoder_types() -> Vec<&'static str> {
    let encoders = ARCHS.iter().filter(|arch| matches!(arch.spec, Builder::Encoder(_)));
    encoders.flat_map(|arch| arch.model_types).copied().collect()
}

impl Arch {
    /// The specification of a configuration of this family, if it is one of decoders.
    pub fn decoder(&self, config: &Value) -> Result<Spec> {
        match self.spec {
            Builder::Decoder(spec) => spec(config),
            Builder::Encoder(_) => Err(Error::unsupported(
                format!("writing text with a {} model", self.family),
                "it is an image encoder, which encodes and classifies images",
            )),
        }
    }

    /// The specification of a configuration of this family, if it is one of image encoders.
    pub fn encoder(&self, config: &Value) -> Result<EncoderSpec> {
        match self.spec {
            Builder::Encoder(spec) => spec(config),
            Builder::Decoder(_) => Err(Error::unsupported(
                format!("encoding images with a {} model", self.family),
                "it is a language model, which writes text",
            )),
        }
    }

    /// The name transformers' own model class gives to the weight stored as `name`.
    pub fn canonical(&self, name: &str) -> String {
        for (other, usual) in self.prefixes {
            if let Some(rest) = name.strip_prefix(other) {
                return format!("{usual}{rest}");
            }
        }
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn unknown_families_list_the_known_ones() {
        let message = spec(&json!({"model_type": "mamba"})).map_err(|e| e.to_string()).expect_err("unknown");
        assert!(
            message.contains("mamba") && message.contains("qwen2") && message.contains("bloom"),
            "{message}"
        );
        assert!(spec(&json!({})).is_err());
        assert!(spec(&json!({"model_type": ["llama"]})).is_err());
        assert!(spec(&json!(7)).is_err());
    }

    #[test]
    fn prefixes_are_normalised() {
        let name =
            |family: &str, name: &str| find(&json!({"model_type": family})).expect("known").canonical(name);
        assert_eq!(name("gpt2", "h.0.ln_1.weight"), "transformer.h.0.ln_1.weight");
        assert_eq!(name("gpt2", "transformer.h.0.ln_1.weight"), "transformer.h.0.ln_1.weight");
        assert_eq!(name("gpt2", "lm_head.weight"), "lm_head.weight");
        assert_eq!(name("bloom", "word_embeddings.weight"), "transformer.word_embeddings.weight");
        assert_eq!(name("opt", "decoder.embed_tokens.weight"), "model.decoder.embed_tokens.weight");
        assert_eq!(name("llama", "layers.3.mlp.up_proj.weight"), "model.layers.3.mlp.up_proj.weight");
        for stored in ["language_model.model.norm.weight", "model.language_model.norm.weight", "norm.weight"]
        {
            assert_eq!(name("gemma3_text", stored), "model.norm.weight");
        }
        assert_eq!(name("gemma3", "language_model.lm_head.weight"), "lm_head.weight");
    }

    #[test]
    fn family_and_type_names_are_unique() {
        let names = model_types();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name}");
        }
    }
}
