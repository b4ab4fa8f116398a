//! The store in one file: what is bound to upstream and credentials, and how.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ring::rand::{SecureRandom, SystemRandom};

use super::disk::{HeldLock, PrivateFile, Problem};
use super::format::{self, Masked, Payload, Salt, TokenEntry};
use super::mask::{Mask, Range, SALT_BYTES};
use super::{Contents, Operation, StoreError, StoredToken};
use crate::credentials::Pair;
use crate::secret::Token;
use crate::token::mint::is_safe_id;

/// The token in use, its predecessor, and what other credentials made of either.
const MAX_KNOWN: usize = 4;

/// One file, possibly shared by several processes. Its methods block.
#[derive(Debug)]
pub struct FileStore {
    file: PrivateFile,
    upstream: String,
    /// Whether leftovers of a killed predecessor were looked for.
    cleaned: AtomicBool,
    /// The last tokens that were saved or loaded, each with its masked form: see [`FileStore::mask`].
    known: Mutex<VecDeque<(Token, Masked)>>,
}

impl FileStore {
    pub(super) fn new(path: PathBuf, upstream: String) -> Self {
        Self { file: PrivateFile::new(path), upstream, cleaned: AtomicBool::new(false), known: Mutex::default() }
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(super) fn load(&self, pair: &Pair, now: SystemTime) -> Result<Contents, StoreError> {
        if !self.cleaned.swap(true, Ordering::Relaxed) {
            self.file.remove_leftovers();
        }
        let Some(payload) = self.payload()? else { return Ok(Contents::default()) };
        let token = payload.token.map(|token| self.unmask(token, pair)).transpose();
        let token = token.map_err(|problem| self.error(Operation::Read, problem))?;
        let attempts = payload.attempts_unix_ms.into_iter().map(from_unix_ms).collect();
        Ok(Contents { token, attempts }.forget_old(now))
    }

    /// Whether a load would find something to refuse, whatever the credentials.
    pub(super) fn inspect(&self) -> Result<(), StoreError> {
        self.payload().map(drop)
    }

    fn payload(&self) -> Result<Option<Payload>, StoreError> {
        let failed = |problem| self.error(Operation::Read, problem);
        let Some(bytes) = self.file.read().map_err(failed)? else { return Ok(None) };
        let payload = format::decode(&bytes).map_err(|reason| failed(Problem::Refused(reason)))?;
        if payload.upstream != self.upstream {
            return Err(failed(Problem::Refused(format!("it is for {}, not for {}", payload.upstream, self.upstream))));
        }
        Ok(Some(payload))
    }

    pub(super) fn save(&self, contents: Contents, pair: &Pair, now: SystemTime) -> Result<(), StoreError> {
        let contents = contents.prune(now);
        let failed = |problem: Problem| self.error(Operation::Write, problem);
        let token = match contents.token {
            None => None,
            Some(StoredToken { token, id, name, created }) => {
                let masked = self.mask(&token, pair).map_err(|error| failed(error.into()))?;
                Some(TokenEntry { masked, id, name, created_unix_ms: to_unix_ms(created) })
            }
        };
        let attempts_unix_ms = contents.attempts.into_iter().map(to_unix_ms).collect();
        let text = format::encode(Payload { upstream: self.upstream.clone(), token, attempts_unix_ms });
        self.file.replace(&text).map_err(failed)
    }

    /// `None` where another process holds it.
    pub(super) fn try_lock(&self) -> Result<Option<HeldLock>, StoreError> {
        self.file.try_lock().map_err(|problem| self.error(Operation::Lock, problem))
    }

    /// A token is masked once: saved again, under whatever credentials, it has the form that it had. Two forms of one token would be what the module `mask`
    /// avoids, since only the right guess unmasks both to the same.
    fn mask(&self, token: &Token, pair: &Pair) -> io::Result<Masked> {
        if let Some((_, masked)) = self.known().iter().find(|(known, _)| known == token) {
            return Ok(masked.clone());
        }
        let mut salt = [0; SALT_BYTES];
        SystemRandom::new().fill(&mut salt).map_err(|_| io::Error::other("the system gives no random numbers"))?;
        let ranges = Range::of(token.expose());
        let text = Mask::new(pair, &self.upstream, &salt).mask(token.expose(), &ranges);
        let masked = Masked { text, ranges, salt: Salt(salt) };
        self.remember(token.clone(), masked.clone());
        Ok(masked)
    }

    fn unmask(&self, stored: TokenEntry, pair: &Pair) -> Result<StoredToken, Problem> {
        let TokenEntry { masked, id, name, created_unix_ms } = stored;
        let text = Mask::new(pair, &self.upstream, &masked.salt.0).unmask(&masked.text, &masked.ranges);
        let token =
            Token::new(text.as_str().to_owned()).map_err(|problem| Problem::Refused(format!("its token cannot be used: {problem}")))?;
        self.remember(token.clone(), masked);
        // Ids go into the paths of revocations.
        Ok(StoredToken { token, id: id.filter(|id| is_safe_id(id)), name, created: from_unix_ms(created_unix_ms) })
    }

    fn remember(&self, token: Token, masked: Masked) {
        let mut known = self.known();
        known.retain(|(other, _)| *other != token);
        known.push_front((token, masked));
        known.truncate(MAX_KNOWN);
    }

    fn known(&self) -> MutexGuard<'_, VecDeque<(Token, Masked)>> {
        // Nothing is ever left half done in it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, operation: Operation, problem: Problem) -> StoreError {
        let path = self.path().to_owned();
        match problem {
            Problem::Refused(reason) => StoreError::Refused { operation, path, reason },
            Problem::Unusable(reason) => StoreError::Unusable { operation, path, reason },
            Problem::Io(source) => StoreError::Io { operation, path, source },
        }
    }
}

/// Times before the epoch are nobody's; they become the epoch.
fn to_unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Times beyond what the system can express become the epoch: very old.
fn from_unix_ms(milliseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::secret::{Email, Password};

    const TOKEN: &str = "CanaryToken0123456789abcdefXYZ";

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    fn pair(password: &str) -> Pair {
        Pair {
            email: Email::new("canary@example.com".to_owned()).unwrap(),
            password: Password::new(password.to_owned()).unwrap(),
            source: "a test".to_owned(),
            read_again: true,
            loaded_at: now(),
        }
    }

    fn contents() -> Contents {
        let token = StoredToken {
            token: Token::new(TOKEN.to_owned()).unwrap(),
            id: Some("t-1".to_owned()),
            name: "upsolver-auth-proxy/x".to_owned(),
            created: now() - Duration::from_millis(1_234),
        };
        Contents { token: Some(token), attempts: vec![now() - Duration::from_secs(30), now()] }
    }

    struct Place {
        _directory: tempfile::TempDir,
        store: FileStore,
    }

    impl Place {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = FileStore::new(directory.path().join("token.json"), "https://api.upsolver.com".to_owned());
            Self { _directory: directory, store }
        }

        fn saved() -> Self {
            let place = Self::new();
            place.store.save(contents(), &pair("canary password"), now()).unwrap();
            place
        }

        fn load(&self) -> Result<Contents, StoreError> {
            self.store.load(&pair("canary password"), now())
        }
    }

    /// C10, C30, section 7: what was saved comes back for the same credentials; for others another token of the same look; the file shows none of them.
    #[test]
    fn c30_a_token_comes_back_for_its_credentials_alone() {
        let place = Place::saved();
        assert_eq!(place.load().unwrap(), contents());
        let foreign = place.store.load(&pair("other"), now()).unwrap().token.unwrap().token;
        assert_ne!(foreign.expose(), TOKEN);
        assert_eq!(foreign.expose().len(), TOKEN.len());
        let text = fs::read_to_string(place.store.path()).unwrap();
        assert!(["Canary", "canary", "0123456789", "example.com"].iter().all(|secret| !text.contains(secret)), "{text}");
    }

    /// C30: one token is never there in two forms, which only the right credentials would unmask alike; another token shares nothing with it.
    #[test]
    fn c30_a_token_is_masked_once() {
        let place = Place::saved();
        let first = fs::read(place.store.path()).unwrap();
        place.store.save(contents(), &pair("canary password"), now()).unwrap();
        assert_eq!(fs::read(place.store.path()).unwrap(), first);

        let restarted = FileStore::new(place.store.path().to_owned(), "https://api.upsolver.com".to_owned());
        let loaded = restarted.load(&pair("canary password"), now()).unwrap();
        restarted.load(&pair("rotated"), now()).unwrap();
        restarted.save(loaded, &pair("rotated"), now()).unwrap();
        assert_eq!(fs::read(place.store.path()).unwrap(), first, "nor is there a second form after a restart and a rotation");

        let salt = |bytes: &[u8]| format::decode(bytes).unwrap().token.unwrap().masked.salt;
        let mut other = contents();
        other.token.as_mut().unwrap().token = Token::new("another".to_owned()).unwrap();
        restarted.save(other, &pair("rotated"), now()).unwrap();
        assert_ne!(salt(&fs::read(place.store.path()).unwrap()), salt(&first));
    }

    #[test]
    fn c30_a_file_of_another_upstream_is_refused() {
        let place = Place::saved();
        let other = FileStore::new(place.store.path().to_owned(), "https://other.example".to_owned());
        let error = other.load(&pair("canary password"), now()).unwrap_err();
        assert!(error.to_string().ends_with("it is for https://api.upsolver.com, not for https://other.example"), "{error}");
    }

    /// C27: nothing there is no error; what no save wrote is refused, and the next save replaces it.
    #[test]
    fn c27_absent_is_empty_and_damage_is_refused() {
        let place = Place::new();
        assert_eq!(place.load().unwrap(), Contents::default());
        let rows: [(&[u8], &str); 4] =
            [(b"", "damaged (line 1, column 0)"), (b"{}", "damaged"), (b"\0\xff", "damaged"), (br#"{"version":2}"#, "version 2")];
        for (bytes, expected) in rows {
            fs::write(place.store.path(), bytes).unwrap();
            fs::set_permissions(place.store.path(), fs::Permissions::from_mode(0o600)).unwrap();
            let error = place.load().unwrap_err();
            assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().contains(expected), "{error}");
        }
        place.store.save(contents(), &pair("canary password"), now()).unwrap();
        assert_eq!(place.load().unwrap(), contents());
    }
}
