//! `tidegate cert ca | gateway | device`: certificates by rcgen, for development and for sites without an authority of their own.
//!
//! The authority and the gateway get ECDSA P-256 keys, which every TLS client knows; a device gets Ed25519, whose public key is
//! registered and pinned, so its certificate needs no authority.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::message::DeviceId;
use crate::units::Date;

use super::private_file;
use super::{Context, Failure};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A certificate authority: ca.crt and ca.key.
    Ca {
        /// The authority's common name.
        #[arg(long, default_value = "Tidegate CA")]
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// A server certificate signed by ca.key: gateway.crt (with the authority's appended) and gateway.key.
    Gateway {
        /// DNS names and addresses that clients connect to [default: localhost, 127.0.0.1, ::1].
        #[arg(long = "host", value_name = "NAME|ADDRESS")]
        hosts: Vec<String>,
        /// Folder of ca.crt and ca.key [default: the output folder].
        #[arg(long, value_name = "DIR")]
        ca: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
    /// A self-signed Ed25519 client certificate: ID.crt and ID.key. Register the key with `tidegate device add`.
    Device {
        /// The device's id.
        id: String,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Args)]
struct Output {
    /// Folder to write to.
    #[arg(long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    /// Days until the certificate expires.
    #[arg(long, default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
}

pub fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let (files, next) = match &arguments.what {
        What::Ca { name, output } => {
            let ca = authority(name, output.days)?;
            private_file::create_folder(&output.out, false)?;
            (ca.write(&output.out, "ca")?, "give ca.crt to clients; keep ca.key away from the gateway")
        }
        What::Gateway { hosts, ca, output } => {
            let ca = Issued::read(ca.as_deref().unwrap_or(&output.out), "ca")?;
            let gateway = gateway(&ca, hosts, output.days)?;
            private_file::create_folder(&output.out, false)?;
            (gateway.write(&output.out, "gateway")?, "name both in a listener with transport = \"tls\"")
        }
        What::Device { id, output } => {
            let id = DeviceId::parse(id).map_err(|e| Failure::input(format!("`{id}`: {e}")))?;
            let device = device(&id, output.days)?;
            private_file::create_folder(&output.out, false)?;
            (device.write(&output.out, id.as_str())?, "register the certificate's key with `tidegate device add`")
        }
    };
    if context.json {
        let files: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
        return context.print_json(&serde_json::json!({ "ok": true, "files": files }));
    }
    let written: String = files.iter().map(|f| format!("wrote {}\n", f.display())).collect();
    context.print(&format!("{written}next: {next}\n"))
}

/// A certificate chain with its private key, both PEM.
#[derive(Debug)]
pub struct Issued {
    pub certificate: String,
    pub key: String,
}

impl Issued {
    /// Writes NAME.crt and NAME.key (mode 0600) into a folder.
    pub fn write(&self, folder: &Path, name: &str) -> Result<Vec<PathBuf>, Failure> {
        let key = folder.join(format!("{name}.key"));
        let certificate = folder.join(format!("{name}.crt"));
        private_file::write_secret(&key, &self.key)?;
        private_file::write(&certificate, &self.certificate)?;
        Ok(vec![certificate, key])
    }

    fn read(folder: &Path, name: &str) -> Result<Self, Failure> {
        let read = |extension: &str| {
            let path = folder.join(format!("{name}.{extension}"));
            std::fs::read_to_string(&path).map_err(|e| {
                Failure::input(format!("cannot read {}: {e}", path.display()))
                    .help("`tidegate cert ca` makes an authority, `--ca DIR` names its folder")
            })
        };
        Ok(Issued { certificate: read("crt")?, key: read("key")? })
    }
}

/// A self-signed authority that may sign leaves only.
pub fn authority(name: &str, days: u32) -> Result<Issued, Failure> {
    let key = KeyPair::generate().map_err(fault)?;
    let certificate = authority_parameters(name, days)?.self_signed(&key).map_err(fault)?;
    Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn authority_parameters(name: &str, days: u32) -> Result<CertificateParams, Failure> {
    let mut params = parameters(name, days, Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// A server certificate for `hosts` (empty: this machine's loopback names), followed by its authority's.
pub fn gateway(ca: &Issued, hosts: &[String], days: u32) -> Result<Issued, Failure> {
    let ca_key = KeyPair::from_pem(&ca.key).map_err(|e| Failure::input(format!("ca.key: {e}")))?;
    let name = common_name_of(&ca.certificate).ok_or_else(|| {
        Failure::input("ca.crt is not an authority made by `tidegate cert ca`")
            .help("sign with the tool that made it, and name the result in the listener")
    })?;
    let issuer = Issuer::new(authority_parameters(&name, 1)?, ca_key);
    let loopback = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let hosts = if hosts.is_empty() { loopback.to_vec() } else { hosts.to_vec() };
    let mut names = Vec::new();
    for host in &hosts {
        names.push(match host.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => {
                let refuse = || Failure::input(format!("`{host}` is neither a DNS name nor an address"));
                let name = host.as_str().try_into().ok().filter(|_| is_dns_name(host));
                SanType::DnsName(name.ok_or_else(refuse)?)
            }
        });
    }
    let mut params = parameters(hosts.first().map_or("gateway", String::as_str), days, names)?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(fault)?;
    let certificate = params.signed_by(&key, &issuer).map_err(fault)?;
    Ok(Issued { certificate: certificate.pem() + &ca.certificate, key: key.serialize_pem() })
}

/// Labels of letters, digits and inner hyphens (RFC 1123 section 2.1); the first may be a wildcard.
fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 253 && name.strip_prefix("*.").unwrap_or(name).split('.').all(is_label)
}

/// A self-signed client certificate with an Ed25519 key.
pub fn device(id: &DeviceId, days: u32) -> Result<Issued, Failure> {
    let mut params = parameters(id.as_str(), days, Vec::new())?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(fault)?;
    let certificate = params.self_signed(&key).map_err(fault)?;
    Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn parameters(common_name: &str, days: u32, names: Vec<SanType>) -> Result<CertificateParams, Failure> {
    let mut params = CertificateParams::new(Vec::new()).map_err(fault)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = names;
    let today = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400);
    // From yesterday: a device's clock may be behind.
    let (first, last) = (Date::from_days(today.saturating_sub(1)), Date::from_days(today + u64::from(days)));
    params.not_before = rcgen::date_time_ymd(first.year as i32, first.month as u8, first.day as u8);
    params.not_after = rcgen::date_time_ymd(last.year as i32, last.month as u8, last.day as u8);
    Ok(params)
}

fn fault(error: rcgen::Error) -> Failure {
    Failure::fault(format!("cannot make a certificate: {error}"))
}

/// The subject of a certificate, if it is one common name in UTF-8 and nothing else, as [`authority`] writes it.
///
/// An issuer's name must be repeated byte for byte in what it signs (RFC 5280 section 4.1.2.4), so another shape is not guessed at.
fn common_name_of(pem: &str) -> Option<String> {
    const COMMON_NAME: [u8; 5] = [0x06, 0x03, 0x55, 0x04, 0x03];
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (certificate, _) = element(&der, 0x30)?;
    let (body, _) = element(certificate, 0x30)?;
    let (_, rest) = element(body, 0xa0)?; // version
    let (_, rest) = element(rest, 0x02)?; // serial number
    let (_, rest) = element(rest, 0x30)?; // signature algorithm
    let (_, rest) = element(rest, 0x30)?; // issuer
    let (_, rest) = element(rest, 0x30)?; // validity
    let (subject, _) = element(rest, 0x30)?;
    let (set, more) = element(subject, 0x31)?;
    let (pair, _) = element(set, 0x30)?;
    let (name, _) = element(pair.strip_prefix(&COMMON_NAME)?, 0x0c)?;
    if more.is_empty() { String::from_utf8(name.to_vec()).ok() } else { None }
}

/// Splits one DER element with this tag off `bytes`: its content, and what follows.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = bytes.split_first()?;
    let (first, mut rest) = rest.split_first()?;
    let mut length = usize::from(*first);
    if *first >= 0x80 {
        let (digits, after) = rest.split_at_checked(usize::from(*first & 0x7f).min(4))?;
        length = digits.iter().fold(0, |n, d| n << 8 | usize::from(*d));
        rest = after;
    }
    (*found == tag).then_some(())?;
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_certificate_is_signed_by_its_authority_and_names_its_hosts() {
        let ca = authority("test", 10).unwrap();
        let gateway = gateway(&ca, &["gw.example".into(), "192.0.2.1".into()], 5).unwrap();
        assert_eq!(gateway.certificate.matches("BEGIN CERTIFICATE").count(), 2, "the chain carries the authority");
        assert!(gateway.certificate.ends_with(&ca.certificate));
        assert_eq!(common_name_of(&ca.certificate).as_deref(), Some("test"));
    }

    #[test]
    fn what_is_no_host_is_refused() {
        let ca = authority("test", 10).unwrap();
        for host in ["gw", "gw-1.example.org", "*.example.org", "localhost", "2001:db8::1"] {
            gateway(&ca, &[host.into()], 5).unwrap();
        }
        for host in ["", "bad host", "a..b", "-a.org", "a.*.org", "http://gw", "gw:8883", "ä.org"] {
            let failure = gateway(&ca, &[host.into()], 5).unwrap_err();
            assert_eq!(failure.exit, crate::cli::Exit::Input, "{host}");
        }
    }

    #[test]
    fn an_authority_made_by_another_tool_is_not_guessed_at() {
        let mut params = authority_parameters("x", 1).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        let key = KeyPair::generate().unwrap();
        let ca = Issued { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() };
        assert_eq!(gateway(&ca, &[], 5).unwrap_err().exit, crate::cli::Exit::Input);
        assert_eq!(common_name_of("no PEM"), None);
    }

    #[test]
    fn a_device_certificate_carries_an_ed25519_key() {
        let device = device(&DeviceId::parse("sensor-1").unwrap(), 5).unwrap();
        let key = KeyPair::from_pem(&device.key).unwrap();
        assert!(key.is_compatible(&rcgen::PKCS_ED25519));
    }
}
