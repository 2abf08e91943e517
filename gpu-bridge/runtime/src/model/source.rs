//! Where weights come from, whatever the file format calls them.

use super::ModelError;

/// One tensor of a Llama-family decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorId {
    /// `vocabulary × hidden`.
    Embedding,
    /// `hidden`.
    FinalNorm,
    /// `vocabulary × hidden`; absent when tied.
    Output,
    /// A part of one layer.
    Layer(usize, Part),
}

/// A tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Part {
    InputNorm,
    Query,
    Key,
    Value,
    QueryBias,
    KeyBias,
    ValueBias,
    QueryNorm,
    KeyNorm,
    AttentionOutput,
    PostNorm,
    Gate,
    Up,
    Down,
}

/// Gives tensors in single precision, rows of outputs, heads with paired halves.
pub trait TensorSource {
    /// The tensor, or `None` if the model has none of that kind.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    fn tensor(&self, id: TensorId) -> Result<Option<Vec<f32>>, ModelError>;
}
