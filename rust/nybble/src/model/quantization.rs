//! Reading `quantization_config` in compressed-tensors form.
//!
//! It is a list of groups. A group names its modules by *targets* and says how their weights are stored and to how many
//! bits the activations that meet them are rounded. A target is a module's full path, a class (`Linear`, `Embedding`), or a
//! regular expression after `re:` that must fit from the path's start. When several fit, the full path wins, then the
//! regular expression, then the class; what `ignore` fits is left as it is.
//!
//! Only what the kernels here compute exactly is accepted: 4- or 8-bit integers with a scale a group, a row or a tensor, and
//! activations left alone or rounded to 8, 7 or 4 bits while running. Anything else is refused by name.

use regex::Regex;
use serde_json::{Map, Value};

use super::config::brief;
use crate::error::{Error, Result};

const FILE: &str = "config.json: quantization_config";
/// Most groups and most targets in a group; real files have a handful.
const MAX_LIST: usize = 100_000;

/// How a group's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// `weight_packed`: codes side by side in 32-bit words.
    Packed,
    /// `weight`: one signed byte a code.
    Bytes,
}

/// Columns of a row that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// That many.
    Columns(usize),
    /// The whole row.
    Row,
    /// All rows.
    Tensor,
}

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPoints {
    /// Not at all: the middle code is the zero point.
    Middle,
    /// Codes side by side in 32-bit words, down the columns.
    Packed,
    /// One signed byte each: a code less the middle one.
    Bytes,
    /// Floats, likewise less the middle code: multiples of 1/16.
    Fractions,
}

/// How the weights of a module were quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightScheme {
    /// 4 or 8.
    pub bits: u32,
    /// Their zero points.
    pub zeros: ZeroPoints,
    /// Weights under one scale.
    pub grouping: Grouping,
    /// In which tensors.
    pub storage: Storage,
}

/// Values of a linear's inputs that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputGrouping {
    /// Those of a token.
    Token,
    /// That many columns of a token.
    Group(usize),
    /// All; the scale is in the file (`input_scale`), found on calibration data.
    Tensor,
}

/// How the inputs of a linear are rounded while running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActivationScheme {
    /// 8, 7 or 4.
    pub bits: u32,
    /// What shares a scale.
    pub grouping: InputGrouping,
}

/// What a module's group says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Its weights.
    pub weights: WeightScheme,
    /// Its inputs; none leaves them in float.
    pub activations: Option<ActivationScheme>,
}

/// How modules are quantized.
#[derive(Debug, Clone)]
pub struct Quantization {
    groups: Vec<Group>,
    ignore: Vec<Target>,
}

#[derive(Debug, Clone)]
struct Group {
    targets: Vec<Target>,
    scheme: Scheme,
}

#[derive(Debug, Clone)]
enum Target {
    Text(String),
    Pattern(Regex),
}

/// How closely a target fits; the closest wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    Class,
    Pattern,
    Path,
}

impl Target {
    fn parse(text: &str) -> Result<Self> {
        let Some(pattern) = text.strip_prefix("re:") else { return Ok(Self::Text(text.into())) };
        // The configuration's expressions fit from the start on, wherever they end. This engine runs in linear time.
        let regex = regex::RegexBuilder::new(&format!("^(?:{pattern})")).size_limit(1 << 20).build();
        regex.map(Self::Pattern).map_err(|error| {
            Error::unsupported(
                format!("the target {text:?}"),
                format!("regular expressions without look-around and back-references are read ({error})"),
            )
        })
    }

    fn fit(&self, module: &str, classes: &[&str]) -> Option<Fit> {
        match self {
            Self::Text(text) if text == module => Some(Fit::Path),
            Self::Text(text) if classes.contains(&text.as_str()) => Some(Fit::Class),
            Self::Pattern(regex) if regex.is_match(module) => Some(Fit::Pattern),
            _ => None,
        }
    }
}

impl Quantization {
    /// Reads the `quantization_config` of a configuration, if it has one.
    pub fn read(config: &Value) -> Result<Option<Self>> {
        let section = match config.get("quantization_config").or_else(|| config.get("compression_config")) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(Error::format(FILE, "section", "an object", brief(other))),
        };
        match text(section, "quant_method") {
            Some("compressed-tensors") => {}
            found => {
                return Err(Error::unsupported(
                    format!("quant_method {}", found.map_or("(none)".into(), |name| format!("{name:?}"))),
                    "compressed-tensors is read; other quantized folders must be converted, or the original used",
                ));
            }
        }
        if let Some(status) = text(section, "quantization_status")
            && status != "compressed"
        {
            return Err(Error::unsupported(
                format!("quantization_status {status:?}"),
                "\"compressed\" is read",
            ));
        }
        for key in ["sparsity_config", "transform_config"] {
            let format = section.get(key).and_then(|inner| inner.get("format")).and_then(Value::as_str);
            let empty = |value: &Value| match value {
                Value::Null => true,
                Value::Object(map) => map.values().all(|v| v.as_object().is_some_and(Map::is_empty)),
                _ => false,
            };
            if !section.get(key).is_none_or(empty) && format != Some("dense") {
                return Err(Error::unsupported(key, "folders without it are read"));
            }
        }
        let format = text(section, "format");
        let groups = match section.get("config_groups") {
            Some(Value::Object(groups)) if !groups.is_empty() && groups.len() <= MAX_LIST => groups,
            other => {
                let found = other.map_or("nothing".into(), brief);
                return Err(Error::format(FILE, "config_groups", "an object of groups", found));
            }
        };
        let groups =
            groups.iter().map(|(name, group)| Group::read(name, group, format)).collect::<Result<_>>()?;
        let ignore = targets("ignore", section.get("ignore"))?;
        Ok(Some(Self { groups, ignore }))
    }

    /// The scheme of a module; none when it is not quantized. `classes` are the names its class goes by.
    pub fn scheme(&self, module: &str, classes: &[&str]) -> Option<Scheme> {
        if self.ignore.iter().any(|target| target.fit(module, classes).is_some()) {
            return None;
        }
        let fits = self.groups.iter().filter_map(|group| {
            let best = group.targets.iter().filter_map(|target| target.fit(module, classes)).max();
            best.map(|fit| (fit, group.scheme))
        });
        // Of two groups that fit equally the first counts.
        fits.reduce(|best, next| if next.0 > best.0 { next } else { best }).map(|(_, scheme)| scheme)
    }

    /// How inputs are rounded for a head that shares the embedding's weights: as for the first group of linears, but to 8
    /// bits and with scales found while running.
    ///
    /// An embedding has no inputs to round, so its own group seldom says.
    pub fn tied_activations(&self, module: &str, classes: &[&str]) -> Option<ActivationScheme> {
        let own = self
            .groups
            .iter()
            .find(|group| group.targets.iter().any(|target| target.fit(module, classes).is_some()));
        let first = self.groups.iter().find_map(|group| group.scheme.activations);
        let found = own.and_then(|group| group.scheme.activations).or(first)?;
        let grouping = match found.grouping {
            InputGrouping::Tensor => InputGrouping::Token,
            other => other,
        };
        Some(ActivationScheme { bits: 8, grouping })
    }
}

impl Group {
    fn read(name: &str, value: &Value, format: Option<&str>) -> Result<Self> {
        let key = |part: &str| format!("config_groups.{name}.{part}");
        let Value::Object(group) = value else {
            return Err(Error::format(FILE, format!("config_groups.{name}"), "an object", brief(value)));
        };
        let storage = match text(group, "format").or(format) {
            Some("pack-quantized") => Storage::Packed,
            Some("int-quantized" | "naive-quantized") => Storage::Bytes,
            other => {
                return Err(Error::unsupported(
                    format!("{} {}", key("format"), other.map_or("(none)".into(), |f| format!("{f:?}"))),
                    "pack-quantized and int-quantized are read",
                ));
            }
        };
        let Some(Value::Object(weights)) = group.get("weights") else {
            let found = group.get("weights").map_or("nothing".into(), brief);
            return Err(Error::format(FILE, key("weights"), "an object", found));
        };
        if group.get("output_activations").is_some_and(|value| !value.is_null()) {
            return Err(Error::unsupported(key("output_activations"), "float outputs are read"));
        }
        let activations = match group.get("input_activations") {
            None | Some(Value::Null) => None,
            Some(Value::Object(map)) => Some(activations(&key("input_activations"), map)?),
            Some(other) => {
                return Err(Error::format(FILE, key("input_activations"), "an object", brief(other)));
            }
        };
        let scheme = Scheme { weights: weight_scheme(&key("weights"), weights, storage)?, activations };
        Ok(Self { targets: targets(&key("targets"), group.get("targets"))?, scheme })
    }
}

fn text<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    map.get(key).and_then(Value::as_str)
}

fn targets(key: &str, value: Option<&Value>) -> Result<Vec<Target>> {
    let wrong = |found: String| Error::format(FILE, key, "a list of texts", found);
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![Target::parse(one)?]),
        Some(Value::Array(list)) if list.len() <= MAX_LIST => {
            list.iter().map(|item| Target::parse(item.as_str().ok_or_else(|| wrong(brief(item)))?)).collect()
        }
        Some(other) => Err(wrong(brief(other))),
    }
}

/// Refuses a value that is there and not among the accepted ones.
fn only(key: &str, map: &Map<String, Value>, part: &str, accepted: &[Value]) -> Result<()> {
    match map.get(part) {
        None => Ok(()),
        Some(value) if accepted.contains(value) => Ok(()),
        Some(value) => {
            let list: Vec<_> = accepted.iter().map(ToString::to_string).collect();
            Err(Error::unsupported(
                format!("{key}.{part} {}", brief(value)),
                format!("{} is read", list.join(" or ")),
            ))
        }
    }
}

fn size(key: &str, map: &Map<String, Value>, part: &str) -> Result<usize> {
    let value = map.get(part).unwrap_or(&Value::Null);
    value
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| Error::format(FILE, format!("{key}.{part}"), "a positive whole number", brief(value)))
}

fn weight_scheme(key: &str, map: &Map<String, Value>, storage: Storage) -> Result<WeightScheme> {
    only(key, map, "type", &["int".into()])?;
    only(key, map, "dynamic", &[false.into(), Value::Null])?;
    only(key, map, "num_bits", &[4.into(), 8.into()])?;
    only(
        key,
        map,
        "actorder",
        &[Value::Null, "static".into(), "weight".into(), "group".into(), "dynamic".into()],
    )?;
    let strategy = text(map, "strategy");
    let grouping = match (strategy, map.get("group_size").and_then(Value::as_i64)) {
        (Some("group" | "tensor_group"), _) | (None, Some(1..)) => {
            Grouping::Columns(size(key, map, "group_size")?)
        }
        (Some("channel"), _) | (None, Some(-1)) => Grouping::Row,
        (Some("tensor"), _) => Grouping::Tensor,
        _ => {
            let found = map.get("strategy").map_or("nothing".into(), brief);
            return Err(Error::unsupported(
                format!("{key}.strategy {found}"),
                "\"group\", \"tensor_group\", \"channel\" and \"tensor\" are read",
            ));
        }
    };
    let bits = size(key, map, "num_bits")? as u32;
    let zeros = match (map.get("symmetric").and_then(Value::as_bool), strategy, storage) {
        (None | Some(true), _, _) => ZeroPoints::Middle,
        // Of all strategies this is the one whose zero points the format leaves as they are, in the type it names.
        (_, Some("tensor_group"), _) => zero_type(key, map, bits)?,
        (_, Some("tensor"), _) | (_, _, Storage::Bytes) => ZeroPoints::Bytes,
        _ => ZeroPoints::Packed,
    };
    Ok(WeightScheme { bits, zeros, grouping, storage })
}

/// The type of zero points that are not packed.
fn zero_type(key: &str, map: &Map<String, Value>, bits: u32) -> Result<ZeroPoints> {
    match (text(map, "zp_dtype").unwrap_or("torch.int8"), bits) {
        ("torch.int8", _) => Ok(ZeroPoints::Bytes),
        ("torch.float16" | "torch.bfloat16" | "torch.float32", 4) => Ok(ZeroPoints::Fractions),
        (other, bits) => Err(Error::unsupported(
            format!("{key}.zp_dtype {other:?} of {bits}-bit weights"),
            "torch.int8 is read, and for 4 bits torch.float16, torch.bfloat16 and torch.float32",
        )),
    }
}

fn activations(key: &str, map: &Map<String, Value>) -> Result<ActivationScheme> {
    only(key, map, "type", &["int".into()])?;
    only(key, map, "num_bits", &[8.into(), 7.into(), 4.into()])?;
    only(key, map, "symmetric", &[true.into()])?;
    let dynamic = map.get("dynamic").and_then(Value::as_bool);
    let grouping = match (text(map, "strategy"), dynamic) {
        (Some("token"), Some(true)) => InputGrouping::Token,
        (Some("group"), Some(true)) => InputGrouping::Group(size(key, map, "group_size")?),
        (Some("tensor"), Some(false)) => InputGrouping::Tensor,
        (strategy, _) => {
            let found = map.get("dynamic").map_or("nothing".into(), brief);
            return Err(Error::unsupported(
                format!("{key}.strategy {} with dynamic {found}", strategy.unwrap_or("(none)")),
                "\"token\" and \"group\" with dynamic true and \"tensor\" with dynamic false are read",
            ));
        }
    };
    Ok(ActivationScheme { bits: size(key, map, "num_bits").unwrap_or(8) as u32, grouping })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": null,
            "config_groups": {
                "group_0": {"targets": ["Linear"], "format": "pack-quantized",
                    "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32,
                        "dynamic": false, "actorder": null},
                    "input_activations": {"num_bits": 8, "type": "int", "symmetric": true, "dynamic": true,
                        "strategy": "group", "group_size": 32}, "output_activations": null},
                "group_1": {"targets": ["re:.*down_proj$"],
                    "weights": {"num_bits": 8, "type": "int", "symmetric": false, "strategy": "channel"}},
                "group_2": {"targets": ["model.layers.3.mlp.down_proj", "Embedding"],
                    "weights": {"num_bits": 8, "symmetric": true, "strategy": "channel"}}}}})
    }

    #[test]
    fn the_closest_target_wins_and_ignore_beats_all() {
        let quantization = Quantization::read(&config()).expect("good").expect("there");
        let scheme = |module: &str, class: &str| quantization.scheme(module, &[class]);
        let q = scheme("model.layers.0.self_attn.q_proj", "Linear").expect("by class");
        assert_eq!((q.weights.bits, q.weights.grouping), (4, Grouping::Columns(32)));
        assert_eq!(q.activations, Some(eight(InputGrouping::Group(32))));
        let down = scheme("model.layers.0.mlp.down_proj", "Linear").expect("by pattern");
        assert!(
            down.weights.bits == 8 && down.weights.zeros == ZeroPoints::Packed && down.activations.is_none()
        );
        assert!(
            scheme("model.layers.3.mlp.down_proj", "Linear").expect("by path").weights.zeros
                == ZeroPoints::Middle
        );
        assert!(scheme("model.embed_tokens", "Embedding").is_some());
        assert!(scheme("lm_head", "Linear").is_none());
        assert!(scheme("model.norm", "RMSNorm").is_none());
        assert_eq!(
            quantization.tied_activations("model.embed_tokens", &["Embedding"]),
            Some(eight(InputGrouping::Group(32)))
        );
    }

    fn eight(grouping: InputGrouping) -> ActivationScheme {
        ActivationScheme { bits: 8, grouping }
    }

    #[test]
    fn a_tied_head_has_8_bit_inputs_with_scales_of_their_own() {
        let mut config = config();
        let inputs = &mut config["quantization_config"]["config_groups"]["group_0"]["input_activations"];
        *inputs = json!({"num_bits": 4, "strategy": "tensor", "dynamic": false});
        let quantization = Quantization::read(&config).expect("good").expect("there");
        let linear = quantization.scheme("x", &["Linear"]).expect("by class").activations;
        assert_eq!(linear, Some(ActivationScheme { bits: 4, grouping: InputGrouping::Tensor }));
        let head = quantization.tied_activations("model.embed_tokens", &["Embedding"]);
        assert_eq!(head, Some(eight(InputGrouping::Token)));
    }

    #[test]
    fn patterns_fit_from_the_start() {
        let target = Target::parse("re:.*layers\\.1\\.").expect("good");
        assert!(target.fit("model.layers.1.mlp", &[]).is_some());
        assert!(target.fit("model.layers.11.mlp", &[]).is_none());
        assert!(Target::parse("re:layers").expect("good").fit("model.layers", &[]).is_none());
        assert!(Target::parse("re:(?=x)").is_err());
        assert!(Target::parse("re:(((").is_err());
    }

    #[test]
    fn zero_points_are_where_strategy_and_type_say() {
        let read = |strategy: &str, dtype: &str, bits: u32| {
            let mut config = config();
            let weights = &mut config["quantization_config"]["config_groups"]["group_0"]["weights"];
            weights["symmetric"] = json!(false);
            weights["strategy"] = json!(strategy);
            weights["zp_dtype"] = json!(dtype);
            weights["num_bits"] = json!(bits);
            let quantization = Quantization::read(&config).map_err(|error| error.to_string())?;
            Ok::<_, String>(
                quantization.expect("there").scheme("x", &["Linear"]).expect("by class").weights.zeros,
            )
        };
        assert_eq!(read("group", "torch.int8", 4), Ok(ZeroPoints::Packed));
        assert_eq!(read("tensor_group", "torch.int8", 8), Ok(ZeroPoints::Bytes));
        for dtype in ["torch.float16", "torch.bfloat16", "torch.float32"] {
            assert_eq!(read("tensor_group", dtype, 4), Ok(ZeroPoints::Fractions));
            let message = read("tensor_group", dtype, 8).expect_err("tiles hold whole codes");
            assert!(message.contains(dtype) && message.contains("8-bit"), "{message}");
        }
        assert!(read("tensor_group", "torch.float8_e4m3fn", 4).is_err_and(|m| m.contains("float8_e4m3fn")));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_name() {
        assert!(Quantization::read(&json!({"hidden_size": 3})).expect("plain").is_none());
        let group = "/quantization_config/config_groups/group_0";
        for (pointer, value, word) in [
            ("/quantization_config/quant_method", json!("gptq"), "gptq"),
            ("/quantization_config/quantization_status", json!("calibration"), "calibration"),
            ("/quantization_config/config_groups", json!([]), "config_groups"),
            (&format!("{group}/weights"), json!(null), "weights"),
            (&format!("{group}/weights/num_bits"), json!(3), "num_bits"),
            (&format!("{group}/weights/type"), json!("float"), "float"),
            (&format!("{group}/weights/strategy"), json!("block"), "block"),
            (&format!("{group}/weights/group_size"), json!(0), "group_size"),
            (&format!("{group}/format"), json!("nvfp4-pack-quantized"), "nvfp4"),
            (&format!("{group}/input_activations/dynamic"), json!(false), "dynamic"),
            (&format!("{group}/input_activations/num_bits"), json!(6), "num_bits"),
            (&format!("{group}/input_activations/strategy"), json!("tensor"), "tensor"),
            (&format!("{group}/output_activations"), json!({"num_bits": 8}), "output_activations"),
            (&format!("{group}/targets"), json!([1]), "targets"),
        ] {
            let mut config = config();
            *config.pointer_mut(pointer).expect("there") = value;
            let message = Quantization::read(&config).map_err(|e| e.to_string()).expect_err(pointer);
            assert!(message.contains(word), "{pointer}: {message}");
        }
        let mut sparse = config();
        sparse["quantization_config"]["sparsity_config"] = json!({"format": "sparse-24-bitmask"});
        assert!(Quantization::read(&sparse).is_err());
        sparse["quantization_config"]["sparsity_config"] = json!({});
        assert!(Quantization::read(&sparse).is_ok());
    }
}
