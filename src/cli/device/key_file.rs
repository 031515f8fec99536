//! `ID.key`: a device's private key, with what it needs to know about its gateway written above it.
//!
//! RFC 7468 allows text in front of a PEM block, and every reader skips it; so the file works with openssl, and alone is enough for `token` and
//! `login` on another machine.

use std::path::Path;

use tidegate_auth::keyfile::{public_from_text, secret_from_text, secret_to_pem};
use tidegate_auth::{GatewayId, PublicKey, SecretKey, Zeroizing};

use super::Site;
use crate::cli::{Failure, private_file};
use crate::identity::GatewayKey;
use crate::message::DeviceId;

/// A device's key and the gateway that it was made for.
pub(super) struct KeyFile {
    pub(super) secret: SecretKey,
    pub(super) gateway: Option<PublicKey>,
}

impl KeyFile {
    pub(super) fn read(path: &Path) -> Result<KeyFile, Failure> {
        let text = std::fs::read_to_string(path).map(Zeroizing::new);
        let text = text.map_err(|error| Failure::input(format!("cannot read {}: {error}", path.display())))?;
        let secret =
            secret_from_text(&text).map_err(|error| Failure::input(format!("{} is {error}", path.display())))?;
        let gateway = text.lines().find_map(|line| line.strip_prefix(GATEWAY_LINE));
        Ok(KeyFile { secret, gateway: gateway.and_then(|key| public_from_text(key).ok()) })
    }

    /// Writes a new file with mode 0600; never over an existing one.
    pub(super) fn write(path: &Path, id: &DeviceId, secret: &SecretKey, gateway: &PublicKey) -> Result<(), Failure> {
        let pem = secret_to_pem(secret);
        let text = Zeroizing::new(format!("device: {id}\n{GATEWAY_LINE}{gateway}\n{}", pem.as_str()));
        private_file::write_secret(path, &text)
    }
}

/// Which gateway a proof is meant for: its key if that is known, at least its id.
pub(super) struct Target {
    pub(super) id: GatewayId,
    pub(super) key: Option<PublicKey>,
}

impl Target {
    fn of_key(key: PublicKey) -> Target {
        Target { id: GatewayId::of(&key), key: Some(key) }
    }

    /// From `--gateway`, else from the key file, else from the data directory. None if nothing of that says.
    pub(super) fn find(
        given: Option<&str>,
        key_file: &KeyFile,
        site: &impl Fn() -> Result<Site, Failure>,
    ) -> Result<Option<Target>, Failure> {
        if let Some(given) = given {
            return Target::given(given).map(Some);
        }
        if let Some(key) = key_file.gateway {
            return Ok(Some(Target::of_key(key)));
        }
        // A missing configuration is no fault here: the command may run far from the gateway.
        let Ok(site) = site() else { return Ok(None) };
        let public = std::fs::read_to_string(site.data_dir.join(GatewayKey::PUBLIC_FILE)).ok();
        Ok(public.and_then(|pem| public_from_text(&pem).ok()).map(Target::of_key))
    }

    fn given(given: &str) -> Result<Target, Failure> {
        // 64 hex digits could be an id or a key; ids are what is printed everywhere, keys come as files.
        if let Some(id) = tidegate_auth::text::from_hex(given) {
            return Ok(Target { id: GatewayId(id), key: None });
        }
        let pem = std::fs::read_to_string(given).ok();
        let key = pem.and_then(|pem| public_from_text(&pem).ok());
        key.map(Target::of_key).ok_or_else(|| {
            Failure::input(format!("--gateway `{given}` is neither a gateway's id (64 hex digits) nor its gateway.pub"))
        })
    }
}

pub(super) fn no_gateway() -> Failure {
    Failure::input("which gateway is it for?")
        .help("give --gateway ID; the gateway prints it at its start, and `tidegate device add` writes it into ID.key")
}

const GATEWAY_LINE: &str = "gateway-key: ";
