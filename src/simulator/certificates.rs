//! Certificates made at run time: an authority for one run, and good and bad server certificates issued by it.
//!
//! Nothing here is kept on disk unless a caller writes it there, so no private key ever lies in the repository.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// A certificate authority that exists for one run.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a key and a self-signed authority certificate around it.
    pub fn new() -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "simulated Upsolver authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// The authority's own certificate: what a client has to trust.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// The same in DER.
    pub fn der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    /// Issues a certificate for `names` (host names or IP addresses), good or bad as `variant` says. It serves servers and clients alike.
    pub fn issue(&self, names: &[&str], variant: Variant) -> Result<Identity, rcgen::Error> {
        let names: Vec<String> = match variant {
            Variant::WrongName => vec!["elsewhere.invalid".to_owned()],
            _ => names.iter().map(|&name| name.to_owned()).collect(),
        };
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "simulated Upsolver API");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        match variant {
            Variant::Expired => params.not_after = date_time_ymd(2001, 1, 1),
            Variant::NotYetValid => params.not_before = date_time_ymd(4000, 1, 1),
            Variant::Good | Variant::WrongName | Variant::SelfSigned | Variant::UnknownAuthority => {}
        }
        let key = KeyPair::generate()?;
        let certificate = match variant {
            Variant::SelfSigned => params.self_signed(&key)?,
            Variant::UnknownAuthority => params.signed_by(&key, &Self::new()?.issuer)?,
            _ => params.signed_by(&key, &self.issuer)?,
        };
        Ok(Identity {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            certificate: certificate.into(),
            key: key.serialize_der(),
        })
    }
}

/// What is right or wrong with a certificate. A client that trusts the [`Authority`] accepts [`Variant::Good`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Valid, for the names asked for.
    Good,
    /// Its validity ended in 2001.
    Expired,
    /// Its validity begins in the year 4000.
    NotYetValid,
    /// Issued for `elsewhere.invalid`.
    WrongName,
    /// Signed by its own key.
    SelfSigned,
    /// Signed by an authority that nobody knows, though it bears the same name.
    UnknownAuthority,
}

/// A certificate with its private key.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
    certificate_pem: String,
    key_pem: String,
}

impl Identity {
    /// The certificate, for a `certificate_file`.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The private key, for a `private_key_file`. It is a key of this run alone.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The certificate in DER, for a client's or server's own rustls configuration.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The private key in DER.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    /// A server configuration that presents this certificate and offers `alpn`, best first; TLS 1.2 and 1.3.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<rustls::ServerConfig, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate()], self.key())?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::{CertificateError, Error, RootCertStore};

    use super::*;

    /// D06: a client that trusts the authority accepts the good certificate alone, and refuses each bad one for its own reason.
    #[test]
    fn d06_each_variant_is_bad_in_its_own_way() {
        let authority = Authority::new().unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        let verify = |variant| {
            let identity = authority.issue(&["localhost", "127.0.0.1"], variant).unwrap();
            let name = ServerName::try_from("localhost").unwrap();
            verifier.verify_server_cert(&identity.certificate(), &[], &name, &[], UnixTime::now()).err()
        };

        assert_eq!(verify(Variant::Good), None);
        let reason = |variant| match verify(variant) {
            Some(Error::InvalidCertificate(reason)) => reason,
            other => panic!("{variant:?} was not refused as a certificate: {other:?}"),
        };
        assert!(matches!(reason(Variant::Expired), CertificateError::ExpiredContext { .. }));
        assert!(matches!(reason(Variant::NotYetValid), CertificateError::NotValidYetContext { .. }));
        assert!(matches!(reason(Variant::WrongName), CertificateError::NotValidForNameContext { .. }));
        assert!(matches!(reason(Variant::SelfSigned), CertificateError::UnknownIssuer));
        assert!(matches!(reason(Variant::UnknownAuthority), CertificateError::BadSignature));
    }
}
