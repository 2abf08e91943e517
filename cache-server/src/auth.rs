//! Who may do what. A bearer token belongs to one tenant and carries rights; the server knows only hashes of tokens. Without any
//! configured token everybody may do everything, which a server accepts on loopback only.

use crate::config::{ConfigError, TokenConfig};
use cairn_proto::KeySpace;
use std::sync::Arc;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    /// Look up, fetch, explain.
    Read,
    /// Store blocks.
    Publish,
    /// Everything that concerns the whole server, and all tenants.
    Admin,
}

impl Right {
    const ALL: [Self; 3] = [Self::Read, Self::Publish, Self::Admin];

    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Publish => "publish",
            Self::Admin => "admin",
        }
    }
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The only tenant whose spaces it may use; `None` where nobody is asked who they are.
    tenant: Option<Arc<str>>,
    rights: [bool; 3],
    /// Which token; sessions belong to one.
    token: Option<usize>,
}

impl Identity {
    /// # Errors
    /// When the token does not carry the right.
    pub(crate) fn require(&self, right: Right) -> Result<(), Status> {
        if self.rights[right as usize] {
            return Ok(());
        }
        Err(Status::permission_denied(format!("the token does not carry the right to {}", right.name())))
    }

    /// # Errors
    /// When the token may do nothing with blocks, and nothing else.
    pub(crate) fn require_any(&self) -> Result<(), Status> {
        match self.rights.contains(&true) {
            true => Ok(()),
            false => Err(Status::permission_denied("the token carries no right")),
        }
    }

    /// Whether it came with a token.
    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// # Errors
    /// When the space is another tenant's.
    pub(crate) fn require_tenant(&self, space: &KeySpace) -> Result<(), Status> {
        if self.is_tenant(&space.parts().tenant) {
            return Ok(());
        }
        Err(Status::permission_denied("the key space is of another tenant than the token"))
    }

    /// The only tenant whose spaces it may use.
    pub(crate) fn tenant(&self) -> Option<Arc<str>> {
        self.tenant.clone()
    }

    /// Whether spaces of this tenant are its own.
    pub(crate) fn is_tenant(&self, name: &str) -> bool {
        self.tenant.as_deref().is_none_or(|tenant| tenant == name)
    }

    /// Whether both came with the same token.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.token == other.token
    }
}

struct Token {
    hash: blake3::Hash,
    identity: Identity,
}

/// All tokens.
pub(crate) struct Auth(Vec<Token>);

impl Auth {
    /// # Errors
    /// When a token's settings cannot work.
    pub(crate) fn new(tokens: &[TokenConfig]) -> Result<Self, ConfigError> {
        let token = |(i, config): (usize, &TokenConfig)| {
            let mut rights = [false; 3];
            for name in &config.rights {
                let right = Right::ALL.into_iter().find(|right| right.name() == name);
                let right = right.ok_or_else(|| {
                    ConfigError::Value(format!("token: {name:?} is no right; known: read, publish, admin"))
                })?;
                rights[right as usize] = true;
            }
            let tenant = Some(config.tenant.as_str().into());
            Ok(Token { hash: config.hash()?, identity: Identity { tenant, rights, token: Some(i) } })
        };
        Ok(Self(tokens.iter().enumerate().map(token).collect::<Result<_, ConfigError>>()?))
    }

    /// Who sent a request with this metadata. Takes the same time for every wrong token.
    ///
    /// # Errors
    /// When tokens are required and this is none.
    pub(crate) fn identify(&self, metadata: &MetadataMap) -> Result<Identity, Status> {
        if self.0.is_empty() {
            return Ok(Identity { tenant: None, rights: [true; 3], token: None });
        }
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|header| header.strip_prefix("Bearer "));
        let token =
            token.ok_or_else(|| Status::unauthenticated("a bearer token is required: set a token"))?;
        let hash = blake3::hash(token.as_bytes());
        // Hashes are compared in constant time, and all of them.
        let found = self.0.iter().fold(None, |found, token| {
            let same = token.hash == hash;
            if same { Some(&token.identity) } else { found }
        });
        found.cloned().ok_or_else(|| Status::unauthenticated("the token is not known to this server"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(tenant: &str, rights: &[&str], token: &str) -> TokenConfig {
        TokenConfig {
            tenant: tenant.into(),
            rights: rights.iter().map(|right| (*right).into()).collect(),
            blake3: Some(blake3::hash(token.as_bytes()).to_hex().to_string()),
            file: None,
        }
    }

    fn bearer(token: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
        metadata
    }

    #[test]
    fn tokens_say_who_and_what() {
        let tokens = [token("a", &["read"], "one"), token("b", &["read", "publish"], "two")];
        let auth = Auth::new(&tokens).unwrap();
        let one = auth.identify(&bearer("one")).unwrap();
        assert!(one.is_tenant("a") && !one.is_tenant("b"));
        assert!(one.require(Right::Read).is_ok());
        assert!(one.require(Right::Publish).is_err() && one.require(Right::Admin).is_err());
        let two = auth.identify(&bearer("two")).unwrap();
        assert!(two.require(Right::Publish).is_ok() && !one.is_same(&two));
        for wrong in [MetadataMap::new(), bearer(""), bearer("On"), bearer("one ")] {
            assert_eq!(auth.identify(&wrong).unwrap_err().code(), tonic::Code::Unauthenticated);
        }
        assert!(Auth::new(&[token("a", &["write"], "x")]).is_err());
    }

    #[test]
    fn without_tokens_everybody_is_welcome() {
        let anybody = Auth::new(&[]).unwrap().identify(&MetadataMap::new()).unwrap();
        assert!(anybody.is_tenant("any") && anybody.require(Right::Admin).is_ok());
    }
}
