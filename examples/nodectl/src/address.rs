//! The address of a node's gRPC port, checked.

use std::fmt;
use std::str::FromStr;

use proto::common::tuning::endpoint;
use tonic::transport::Endpoint;

/// `host:port` or `http://host:port`.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    text: String,
    endpoint: Endpoint,
}

impl Address {
    /// For connections tuned for bulk.
    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let endpoint = endpoint(text).map_err(|error| error.message().to_owned())?;
        if endpoint.uri().scheme_str() == Some("https") {
            return Err("this nodectl is built without TLS; write host:port or http://host:port".to_owned());
        }
        Ok(Self { text: text.to_owned(), endpoint })
    }
}
