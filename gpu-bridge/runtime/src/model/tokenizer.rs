//! Text to tokens and back, and chat templates. Tokenizing itself is the `tokenizers` crate's; here its definition is read
//! from a `tokenizer.json` or put together from GGUF metadata.

use super::gguf::{Gguf, Value};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;
use thiserror::Error;
use tokenizers::Tokenizer;

/// A tokenizer that is missing, broken or of an unknown kind.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// No definition that this runtime reads.
    #[error("no usable tokenizer: {0}")]
    Missing(String),
    /// The definition is broken.
    #[error("the tokenizer is not valid: {0}")]
    Invalid(String),
    /// A text cannot be tokenized or a template cannot be filled.
    #[error("{0}")]
    Text(String),
}

/// One turn of a conversation.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A tokenizer with its chat template and end tokens.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    template: Option<String>,
    bos: Option<String>,
    eos: Option<String>,
    ends: Vec<u32>,
    add_bos: Option<u32>,
    /// Plain texts get whatever the tokenizer's own post-processor adds.
    post_process: bool,
}

/// Used when a model brings no chat template: ChatML, the most common form.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl TextTokenizer {
    /// One token for each byte; for models without a text side.
    pub(crate) fn bytes() -> Result<Self, TokenizerError> {
        let vocabulary: serde_json::Map<String, serde_json::Value> =
            byte_alphabet().into_iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        let definition = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": byte_level(false), "decoder": byte_level(false),
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        });
        Ok(Self {
            tokenizer: from_json(&definition)?,
            template: None,
            bos: None,
            eos: None,
            ends: Vec::new(),
            add_bos: None,
            post_process: false,
        })
    }

    /// Tokens of a text, with a start token where the model expects one.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids: Vec<u32> = self.add_bos.into_iter().collect();
        ids.extend(self.encode_as(text, self.post_process)?);
        Ok(ids)
    }

    fn encode_as(&self, text: &str, post_process: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, post_process);
        Ok(encoding.map_err(|error| TokenizerError::Text(error.to_string()))?.get_ids().to_vec())
    }

    /// Tokens of a conversation, ready for the assistant's answer.
    ///
    /// # Errors
    /// When the template cannot be filled.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, TokenizerError> {
        let failed =
            |error: minijinja::Error| TokenizerError::Text(format!("the chat template failed: {error}"));
        let mut environment = Environment::new();
        // As transformers renders templates.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(failed)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, text))
        });
        let template = self.template.as_deref().unwrap_or(CHATML);
        let turn = |message: &ChatMessage| {
            let fields = [("role", message.role.clone()), ("content", message.content.clone())];
            minijinja::Value::from_pairs(fields)
        };
        let messages: Vec<minijinja::Value> = messages.iter().map(turn).collect();
        let values = context! {
            messages, add_generation_prompt => true, bos_token => self.bos.clone(), eos_token => self.eos.clone(),
        };
        let text = environment.render_str(template, values).map_err(failed)?;
        // Templates write the start token themselves where they want one.
        self.encode_as(&text, false)
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        // Decoding fails only for ids outside the vocabulary, which have no text.
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }
}

fn from_json(definition: &serde_json::Value) -> Result<Tokenizer, TokenizerError> {
    let bytes = definition.to_string().into_bytes();
    Tokenizer::from_bytes(bytes).map_err(|error| TokenizerError::Invalid(error.to_string()))
}

fn byte_level(use_regex: bool) -> serde_json::Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex})
}

/// The printable characters that byte-level BPE writes bytes as: printable Latin-1 as itself, the rest from U+0100 on.
fn byte_alphabet() -> Vec<char> {
    let printable = |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || byte >= 174;
    let mut next = 256;
    let character = |byte: u32| {
        let code = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    };
    (0..256).map(character).collect()
}

/// How text is cut before BPE, by the name that GGUF gives it. Patterns are those of the models' own definitions.
fn pre_tokenizer(name: &str) -> Result<serde_json::Value, TokenizerError> {
    let split = |digits: &str| {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    match name {
        "gpt-2" | "default" => Ok(byte_level(true)),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            Ok(json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}))
        }
        "llama-bpe" | "llama3" | "llama-v3" => Ok(split(r"\p{N}{1,3}")),
        "qwen2" => Ok(split(r"\p{N}")),
        other => Err(TokenizerError::Missing(format!("the GGUF pre-tokenizer {other:?} is not known"))),
    }
}

/// Token types of GGUF: control tokens are never text, user-defined ones are.
const GGUF_CONTROL: i64 = 3;
const GGUF_USER_DEFINED: i64 = 4;

/// Names of tokens that end an answer besides the declared one.
const TURN_ENDS: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"];

pub(super) fn from_gguf(file: &Gguf) -> Result<TextTokenizer, TokenizerError> {
    if file.text("tokenizer.ggml.model") != Some("gpt2") {
        let model = file.text("tokenizer.ggml.model").unwrap_or("none");
        return Err(TokenizerError::Missing(format!("the GGUF tokenizer {model:?} is not byte-level BPE")));
    }
    let missing = |key: &str| TokenizerError::Missing(format!("the GGUF file lacks tokenizer.ggml.{key}"));
    let tokens = file.list("tokenizer.ggml.tokens").ok_or_else(|| missing("tokens"))?;
    let merges = file.list("tokenizer.ggml.merges").ok_or_else(|| missing("merges"))?;
    let types = file.list("tokenizer.ggml.token_type").unwrap_or_default();
    let text = |value: &Value| match value {
        Value::Text(text) => text.clone(),
        _ => String::new(),
    };
    let tokens: Vec<String> = tokens.iter().map(text).collect();
    let added = types.iter().enumerate().filter_map(|(id, kind)| {
        let special = *kind == Value::Integer(GGUF_CONTROL);
        let added = special || *kind == Value::Integer(GGUF_USER_DEFINED);
        let content = tokens.get(id).filter(|_| added)?;
        Some(json!({"id": id, "content": content, "special": special, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false}))
    });
    // Llama 3 takes whole words of the vocabulary as they are, and wants its start token, whether the file says so or not.
    let llama3 = matches!(file.text("tokenizer.ggml.pre"), Some("llama-bpe" | "llama3" | "llama-v3"));
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let definition = json!({
        "version": "1.0", "added_tokens": added.collect::<Vec<_>>(), "normalizer": null, "post_processor": null,
        "pre_tokenizer": pre_tokenizer(file.text("tokenizer.ggml.pre").unwrap_or("default"))?,
        "decoder": byte_level(false),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges.iter().map(text).collect::<Vec<_>>(),
            "ignore_merges": llama3},
    });
    let named = |key: &str| {
        let id = u32::try_from(file.integer(&format!("tokenizer.ggml.{key}_token_id"))?).ok()?;
        Some((id, tokens.get(id as usize)?.clone()))
    };
    let (bos, eos) = (named("bos"), named("eos"));
    let wants_bos = file.integer("tokenizer.ggml.add_bos_token").map_or(llama3, |value| value == 1);
    let ends = eos.iter().map(|(id, _)| *id);
    let turn_ends = tokens.iter().enumerate().filter(|(_, token)| TURN_ENDS.contains(&token.as_str()));
    Ok(TextTokenizer {
        tokenizer: from_json(&definition)?,
        template: file.text("tokenizer.chat_template").map(str::to_owned),
        add_bos: bos.as_ref().filter(|_| wants_bos).map(|(id, _)| *id),
        ends: ends.chain(turn_ends.map(|(id, _)| id as u32)).collect(),
        bos: bos.map(|(_, token)| token),
        eos: eos.map(|(_, token)| token),
        post_process: false,
    })
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HfTokenizerConfig {
    chat_template: Option<serde_json::Value>,
    bos_token: Option<serde_json::Value>,
    eos_token: Option<serde_json::Value>,
    add_bos_token: Option<bool>,
}

pub(super) fn from_folder(folder: &Path) -> Result<TextTokenizer, TokenizerError> {
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        return TextTokenizer::bytes();
    }
    let tokenizer =
        Tokenizer::from_file(&path).map_err(|error| TokenizerError::Invalid(error.to_string()))?;
    let config = match std::fs::read(folder.join("tokenizer_config.json")) {
        Err(_) => HfTokenizerConfig::default(),
        Ok(json) => serde_json::from_slice(&json)
            .map_err(|error| TokenizerError::Invalid(format!("tokenizer_config.json: {error}")))?,
    };
    // A token is written as its text or as an object around it.
    let token = |value: &Option<serde_json::Value>| match value {
        Some(serde_json::Value::String(text)) => Some(text.clone()),
        Some(other) => other.get("content").and_then(|text| text.as_str()).map(str::to_owned),
        None => None,
    };
    let (bos, eos) = (token(&config.bos_token), token(&config.eos_token));
    let id = |token: &str| tokenizer.token_to_id(token);
    let mut ends: Vec<u32> = eos.iter().filter_map(|token| id(token)).collect();
    ends.extend(TURN_ENDS.iter().filter_map(|token| id(token)));
    let template = match config.chat_template {
        Some(serde_json::Value::String(template)) => Some(template),
        _ => std::fs::read_to_string(folder.join("chat_template.jinja")).ok(),
    };
    let wants_bos = config.add_bos_token == Some(true);
    let post_process = config.add_bos_token.is_none();
    let add_bos = bos.as_ref().filter(|_| wants_bos).and_then(|token| id(token));
    Ok(TextTokenizer { template, add_bos, ends, bos, eos, tokenizer, post_process })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_chatml_is_the_fallback() {
        let tokenizer = TextTokenizer::bytes().unwrap();
        let text = "Hi, größe 12\n\u{1F600}";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids.len(), text.len());
        assert_eq!(tokenizer.decode(&ids), text);
        let chat = [ChatMessage { role: "user".into(), content: "x".into() }];
        let ids = tokenizer.encode_chat(&chat).unwrap();
        assert_eq!(tokenizer.decode(&ids), "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn every_known_pre_tokenizer_is_a_valid_definition() {
        for name in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
            let definition = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(name).unwrap(),
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
            from_json(&definition).unwrap();
        }
        assert!(pre_tokenizer("mystery").is_err());
    }
}
