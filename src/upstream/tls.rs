//! TLS towards the upstream: always verified, no switch to turn that off.
//!
//! Trusted are the built-in Mozilla roots and, beside them, `upstream.ca_file`. Nothing from the environment counts: neither `SSL_CERT_FILE` nor
//! `SSLKEYLOGFILE` is ever read.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CertificateError, ClientConfig, RootCertStore};

use crate::config::HttpVersion;

/// The configuration for every connection to the upstream. Fails where `ca_file` cannot be used, with words for people.
pub fn client_config(ca_file: Option<&Path>, http_version: HttpVersion) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = ca_file {
        for certificate in read_certificates(path)? {
            roots.add(certificate).map_err(|error| format!("{}: a certificate in it cannot be used: {error}", path.display()))?;
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = match http_version {
        HttpVersion::Http1 => vec![b"http/1.1".to_vec()],
        HttpVersion::Http2 => vec![b"h2".to_vec()],
        HttpVersion::Auto => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
    };
    Ok(Arc::new(config))
}

/// The certificates of a PEM file; none is an error.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| format!("{}: cannot be read as PEM certificates: {error}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!("{}: holds no certificate", path.display()));
    }
    Ok(certificates)
}

/// Whether TLS refused the upstream's certificate.
pub(super) fn is_about_certificate(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

/// What TLS had against the upstream, in words that say what to look at; nothing where the connection itself failed. For the log, never for the
/// downstream.
pub(super) fn explain(error: &std::io::Error) -> Option<String> {
    let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match inner {
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            format!("{error} (if other programs accept it, check the clock of this machine)")
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            format!("{error} (check the clock of this machine)")
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!("{error} (a private certificate authority goes into upstream.ca_file)")
        }
        _ => error.to_string(),
    })
}
