//! GGUF files (version 2 and 3): metadata and tensors, dequantised to single precision. The format and the block layouts
//! are those of the GGUF specification in the ggml project.

use super::ModelError;
use super::config::{ModelConfig, RopeScaling};
use super::source::{Part, TensorId, TensorSource};
use half::{bf16, f16};
use std::collections::HashMap;
use std::path::Path;

/// Entries that a file may claim to have: guards against taking memory for a broken file.
const MAX_ENTRIES: u64 = 1 << 24;

/// Elements of a quantised block, of all types read here.
const BLOCK: usize = 32;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any whole number or truth value.
    Integer(i64),
    /// Any float.
    Float(f64),
    /// Text.
    Text(String),
    /// Many of one type.
    List(Vec<Value>),
}

struct TensorInfo {
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// A file in memory.
pub struct Gguf {
    bytes: Vec<u8>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorInfo>,
    data_start: usize,
}

impl Gguf {
    /// Reads a file and its directory.
    ///
    /// # Errors
    /// When it cannot be read or is no GGUF file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let bytes =
            std::fs::read(path).map_err(|error| ModelError::Read(path.display().to_string(), error))?;
        Self::parse(bytes)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self, ModelError> {
        let mut reader = Reader { bytes: &bytes, at: 0 };
        if reader.take(4)? != b"GGUF" {
            return Err(ModelError::Invalid("not a GGUF file".into()));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(ModelError::Unsupported(format!("GGUF version {version}")));
        }
        let (tensor_count, metadata_count) = (reader.count()?, reader.count()?);
        let mut metadata = HashMap::new();
        for _ in 0..metadata_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            metadata.insert(key, reader.value(kind)?);
        }
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let name = reader.text()?;
            let rank = reader.u32()?;
            if rank > 4 {
                return Err(ModelError::Invalid(format!("tensor {name} has {rank} dimensions")));
            }
            let dimensions = (0..rank).map(|_| reader.u64()).collect::<Result<_, _>>()?;
            tensors.insert(name, TensorInfo { dimensions, kind: reader.u32()?, offset: reader.u64()? });
        }
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Integer(alignment)) if *alignment > 0 => *alignment as usize,
            _ => 32,
        };
        let data_start = reader.at.next_multiple_of(alignment);
        Ok(Self { bytes, metadata, tensors, data_start })
    }

    /// The file's bytes, for its fingerprint.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number.
    pub fn integer(&self, key: &str) -> Option<i64> {
        match self.metadata.get(key)? {
            Value::Integer(value) => Some(*value),
            _ => None,
        }
    }

    /// A list.
    pub fn list(&self, key: &str) -> Option<&[Value]> {
        match self.metadata.get(key)? {
            Value::List(values) => Some(values),
            _ => None,
        }
    }

    fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::Float(value) => Some(*value),
            Value::Integer(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The model's shape.
    ///
    /// # Errors
    /// When it is not of the Llama family or lacks a number.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        let architecture = self.architecture()?;
        let number = |key: &str| {
            let value = self.integer(&format!("{architecture}.{key}"));
            let value = value.and_then(|value| usize::try_from(value).ok());
            value.ok_or_else(|| ModelError::Invalid(format!("the GGUF file lacks {architecture}.{key}")))
        };
        let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
        let head_dim = number("attention.key_length").unwrap_or(hidden / heads.max(1));
        let vocabulary = match self.tensors.get("token_embd.weight").map(|t| t.dimensions.as_slice()) {
            Some([_, rows]) => *rows as usize,
            _ => {
                return Err(ModelError::Invalid("the GGUF file has no token_embd.weight".into()));
            }
        };
        let rotated = number("rope.dimension_count").unwrap_or(head_dim);
        if rotated != head_dim {
            let text = format!("rotary positions on {rotated} of a head's {head_dim} elements");
            return Err(ModelError::Unsupported(text));
        }
        let epsilon = self.float(&format!("{architecture}.attention.layer_norm_rms_epsilon"));
        let theta = self.float(&format!("{architecture}.rope.freq_base"));
        ModelConfig {
            name: self.text("general.name").unwrap_or("gguf").to_owned(),
            layers: number("block_count")?,
            hidden,
            intermediate: number("feed_forward_length")?,
            heads,
            kv_heads: number("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            vocabulary,
            rms_epsilon: epsilon.unwrap_or(1e-5) as f32,
            max_positions: number("context_length")?,
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(architecture)?,
            tied_embeddings: !self.tensors.contains_key("output.weight"),
        }
        .check()
    }

    fn architecture(&self) -> Result<&str, ModelError> {
        match self.text("general.architecture") {
            Some(known @ ("llama" | "qwen2" | "qwen3")) => Ok(known),
            other => Err(ModelError::Unsupported(format!(
                "GGUF architecture {other:?}: known are llama, qwen2, qwen3"
            ))),
        }
    }

    fn rope_scaling(&self, architecture: &str) -> Result<RopeScaling, ModelError> {
        if self.tensors.contains_key("rope_freqs.weight") {
            let divisors = self.dequantised("rope_freqs.weight")?;
            return Ok(RopeScaling::PerFrequency(divisors.into_iter().map(f64::from).collect()));
        }
        let factor = self.float(&format!("{architecture}.rope.scaling.factor")).unwrap_or(1.0);
        match self.text(&format!("{architecture}.rope.scaling.type")) {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(factor)),
            Some(other) => Err(ModelError::Unsupported(format!("rope scaling {other:?}"))),
        }
    }

    fn dequantised(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let info = self.tensors.get(name);
        let info = info.ok_or_else(|| ModelError::Invalid(format!("the GGUF file has no tensor {name}")))?;
        let elements = info.dimensions.iter().try_fold(1u64, |product, d| product.checked_mul(*d));
        let elements = elements.and_then(|elements| usize::try_from(elements).ok());
        let format = Format::of(info.kind, name)?;
        let bytes = elements.and_then(|elements| format.bytes(elements));
        let range = bytes.and_then(|bytes| {
            let start = self.data_start.checked_add(usize::try_from(info.offset).ok()?)?;
            self.bytes.get(start..start.checked_add(bytes)?)
        });
        let data = range
            .ok_or_else(|| ModelError::Invalid(format!("tensor {name} reaches past the end of the file")))?;
        Ok(format.decode(data))
    }
}

impl TensorSource for Gguf {
    fn tensor(&self, id: TensorId) -> Result<Option<Vec<f32>>, ModelError> {
        let name = tensor_name(id);
        if !self.tensors.contains_key(&name) {
            return Ok(None);
        }
        let values = self.dequantised(&name)?;
        // The llama converter interleaves the halves of each head's rows; undo that, so that halves are paired.
        if self.architecture()? != "llama" {
            return Ok(Some(values));
        }
        let config = self.config()?;
        let heads = match id {
            TensorId::Layer(_, Part::Query | Part::QueryBias) => config.heads,
            TensorId::Layer(_, Part::Key | Part::KeyBias) => config.kv_heads,
            _ => return Ok(Some(values)),
        };
        let width = match self.tensors[&name].dimensions.as_slice() {
            [width, _] => *width as usize,
            _ => 1,
        };
        let row = heads * config.head_dim * width;
        if row == 0 || values.len() != row {
            return Err(ModelError::Invalid(format!("tensor {name} does not have {heads} heads")));
        }
        Ok(Some(halves_from_pairs(&values, heads, width)))
    }
}

fn halves_from_pairs(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let rows = values.len() / width;
    let head = rows / heads;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let (start, i) = (row / head * head, row % head);
        let (half, pair) = (i / (head / 2), i % (head / 2));
        let from = start + 2 * pair + half;
        out.extend_from_slice(&values[from * width..][..width]);
    }
    out
}

fn tensor_name(id: TensorId) -> String {
    let (layer, part) = match id {
        TensorId::Embedding => return "token_embd.weight".into(),
        TensorId::FinalNorm => return "output_norm.weight".into(),
        TensorId::Output => return "output.weight".into(),
        TensorId::Layer(layer, part) => (layer, part),
    };
    let part = match part {
        Part::InputNorm => "attn_norm.weight",
        Part::Query => "attn_q.weight",
        Part::Key => "attn_k.weight",
        Part::Value => "attn_v.weight",
        Part::QueryBias => "attn_q.bias",
        Part::KeyBias => "attn_k.bias",
        Part::ValueBias => "attn_v.bias",
        Part::QueryNorm => "attn_q_norm.weight",
        Part::KeyNorm => "attn_k_norm.weight",
        Part::AttentionOutput => "attn_output.weight",
        Part::PostNorm => "ffn_norm.weight",
        Part::Gate => "ffn_gate.weight",
        Part::Up => "ffn_up.weight",
        Part::Down => "ffn_down.weight",
    };
    format!("blk.{layer}.{part}")
}

/// Tensor formats that are read, with their numbers in the file.
#[derive(Clone, Copy)]
enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
}

impl Format {
    fn of(kind: u32, name: &str) -> Result<Self, ModelError> {
        match kind {
            0 => Ok(Self::F32),
            1 => Ok(Self::F16),
            2 => Ok(Self::Q4_0),
            3 => Ok(Self::Q4_1),
            6 => Ok(Self::Q5_0),
            7 => Ok(Self::Q5_1),
            8 => Ok(Self::Q8_0),
            30 => Ok(Self::Bf16),
            other => Err(ModelError::Unsupported(format!(
                "GGUF tensor type {other} (tensor {name}): readable are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
            ))),
        }
    }

    /// Bytes of one element or one block.
    fn unit(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (BLOCK, 18),
            Self::Q4_1 => (BLOCK, 20),
            Self::Q5_0 => (BLOCK, 22),
            Self::Q5_1 => (BLOCK, 24),
            Self::Q8_0 => (BLOCK, 34),
        }
    }

    fn bytes(self, elements: usize) -> Option<usize> {
        let (unit, bytes) = self.unit();
        elements.is_multiple_of(unit).then(|| (elements / unit).checked_mul(bytes))?
    }

    fn decode(self, data: &[u8]) -> Vec<f32> {
        let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
        let nibble = |b: &[u8], i: usize| (b[i % 16] >> (4 * (i / 16))) & 15;
        let fifth = |b: &[u8], i: usize| ((b[i / 8] >> (i % 8)) & 1) << 4;
        let blocks = data.chunks_exact(self.unit().1);
        match self {
            Self::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Self::F16 => data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Self::Bf16 => data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Self::Q4_0 => quantised(blocks, |b, i| half(b) * (f32::from(nibble(&b[2..], i)) - 8.0)),
            Self::Q4_1 => quantised(blocks, |b, i| half(b) * f32::from(nibble(&b[4..], i)) + half(&b[2..])),
            Self::Q5_0 => {
                quantised(blocks, |b, i| half(b) * (f32::from(nibble(&b[6..], i) | fifth(&b[2..], i)) - 16.0))
            }
            Self::Q5_1 => quantised(blocks, |b, i| {
                half(b) * f32::from(nibble(&b[8..], i) | fifth(&b[4..], i)) + half(&b[2..])
            }),
            Self::Q8_0 => quantised(blocks, |b, i| half(b) * f32::from(b[2 + i].cast_signed())),
        }
    }
}

fn quantised<'a>(blocks: impl Iterator<Item = &'a [u8]>, element: impl Fn(&[u8], usize) -> f32) -> Vec<f32> {
    blocks.flat_map(|block| (0..BLOCK).map(|i| element(block, i)).collect::<Vec<_>>()).collect()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], ModelError> {
        let part = self.at.checked_add(bytes).and_then(|end| self.bytes.get(self.at..end));
        let part = part.ok_or_else(|| ModelError::Invalid("the GGUF file ends early".into()))?;
        self.at += bytes;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self) -> Result<u64, ModelError> {
        match self.u64()? {
            count if count <= MAX_ENTRIES => Ok(count),
            count => Err(ModelError::Invalid(format!("the GGUF file claims {count} entries"))),
        }
    }

    fn text(&mut self) -> Result<String, ModelError> {
        let length = self.count()? as usize;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Integer(i64::from(self.array::<1>()?[0])),
            1 => Value::Integer(i64::from(self.array::<1>()?[0].cast_signed())),
            2 => Value::Integer(i64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Integer(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Integer(i64::from(self.u32()?)),
            5 => Value::Integer(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Integer(i64::from(self.array::<1>()?[0])),
            8 => Value::Text(self.text()?),
            9 => {
                let (kind, count) = (self.u32()?, self.count()?);
                if kind == 9 {
                    return Err(ModelError::Unsupported("nested arrays in GGUF metadata".into()));
                }
                Value::List((0..count).map(|_| self.value(kind)).collect::<Result<_, _>>()?)
            }
            10 => Value::Integer(self.u64()?.cast_signed()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(ModelError::Invalid(format!("GGUF metadata of type {other}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    #[test]
    fn quantised_blocks_decode_to_their_definition() {
        let nibbles: Vec<u8> = (0..16).map(|i| i | ((15 - i) << 4)).collect();
        let q4_1 = [&scale(0.5)[..], &scale(-1.0), &nibbles].concat();
        let decoded = Format::Q4_1.decode(&q4_1);
        assert_eq!(decoded[3], 0.5 * 3.0 - 1.0);
        assert_eq!(decoded[16 + 3], 0.5 * 12.0 - 1.0);
        let q4_0 = [&scale(2.0)[..], &nibbles].concat();
        assert_eq!(Format::Q4_0.decode(&q4_0)[0], -16.0);
        let q8_0 = [&scale(0.25)[..], &(0..32).map(|i| (i as i8 - 16) as u8).collect::<Vec<_>>()].concat();
        assert_eq!(Format::Q8_0.decode(&q8_0)[1], 0.25 * -15.0);
        let q5_0 = [&scale(1.0)[..], &[0xFF, 0, 0, 0], &nibbles].concat();
        assert_eq!(Format::Q5_0.decode(&q5_0)[..3], [0.0, 1.0, 2.0]);
        assert_eq!(Format::Q5_0.decode(&q5_0)[8], 8.0 - 16.0);
    }

    #[test]
    fn rows_of_a_head_are_put_back_in_halves() {
        let pairs: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let halves = halves_from_pairs(&pairs, 2, 1);
        assert_eq!(halves, [0., 2., 4., 6., 1., 3., 5., 7., 8., 10., 12., 14., 9., 11., 13., 15.]);
    }

    #[test]
    fn broken_files_are_refused_wherever_they_end() {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend(3u64.to_le_bytes());
        file.extend(b"abc");
        file.extend(8u32.to_le_bytes());
        file.extend(2u64.to_le_bytes());
        file.extend(b"xy");
        file.extend(1u64.to_le_bytes());
        file.extend(b"t");
        file.extend(1u32.to_le_bytes());
        file.extend(32u64.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        for cut in 0..file.len() {
            assert!(Gguf::parse(file[..cut].to_vec()).is_err(), "cut at {cut}");
        }
        let gguf = Gguf::parse(file).unwrap();
        assert_eq!(gguf.text("abc"), Some("xy"));
        assert!(gguf.dequantised("t").unwrap_err().to_string().contains("past the end"));
    }
}
