//! The address of a node's gRPC port, checked.

use std::fmt;
use std::str::FromStr;

use proto::common::dial::Dial;
use proto::common::error::Error;
use proto::common::ids::NodeId;
use proto::common::tuning::endpoint;

use crate::trust;

/// `host:port`, `http://host:port` in plaintext, or `https://host:port` by TLS.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    text: String,
}

impl Address {
    /// The way to the node there, which has to be `expected` if there is one and if it can prove that.
    pub(crate) fn dial(&self, expected: Option<&NodeId>) -> Result<Dial, Error> {
        trust::dialer().to(&self.text, expected)
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
        if cfg!(not(feature = "tls")) && endpoint.uri().scheme_str() == Some("https") {
            return Err("this nodectl is built without TLS; write host:port or http://host:port".to_owned());
        }
        Ok(Self { text: text.to_owned() })
    }
}
