//! Listening sockets: bound before anything starts, so that a busy port is a message at start and not a surprise later.

use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener};

use super::stream::Stream;
use crate::config::ListenAddress;

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 1024;

/// A bound socket, on its way to the thread that will accept on it.
#[derive(Debug)]
pub enum Bound {
    /// TCP.
    Tcp(std::net::TcpListener),
    /// A Unix socket; its file is removed when the last holder drops it.
    Unix(StdUnixListener, Arc<SocketFile>),
}

/// A listening socket on its thread.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener, Arc<SocketFile>),
}

/// Why an address cannot be listened at, with what to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen at {address}{}", advice(.source))]
pub struct BindError {
    address: String,
    source: io::Error,
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => " (another process uses it: stop that one or set another address)",
        io::ErrorKind::PermissionDenied => " (ports below 1024 and other users' directories need privileges: set another address)",
        io::ErrorKind::AddrNotAvailable => " (no interface of this host has that address)",
        _ => "",
    }
}

/// Binds `addresses`, each `workers` times (`SO_REUSEPORT`; a Unix socket is shared). The result has one list for each worker.
///
/// `localhost` is 127.0.0.1 and, where the host has IPv6, `::1`; a port 0 is chosen once for both.
pub fn bind(addresses: &[ListenAddress], unix_mode: u32, workers: usize) -> Result<Vec<Vec<Bound>>, BindError> {
    let mut lists: Vec<Vec<Bound>> = (0..workers).map(|_| Vec::new()).collect();
    for address in addresses {
        match address {
            ListenAddress::Localhost(port) => {
                let port = bind_tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, *port)), &mut lists)?.port();
                let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
                match bind_tcp(v6, &mut lists) {
                    Ok(_) => {}
                    // A host without IPv6.
                    Err(error) if matches!(error.source.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported) => {}
                    Err(error) => return Err(error),
                }
            }
            ListenAddress::Socket(address) => {
                bind_tcp(*address, &mut lists)?;
            }
            ListenAddress::Unix(path) => bind_unix(path, unix_mode, &mut lists)?,
        }
    }
    Ok(lists)
}

fn bind_tcp(address: SocketAddr, lists: &mut [Vec<Bound>]) -> Result<SocketAddr, BindError> {
    let bind_error = |source| BindError { address: address.to_string(), source };
    // With SO_REUSEPORT two proxies would silently share a port. The first socket of a port is therefore bound without it, as a question.
    let shared = lists.len() > 1;
    let first = tcp_socket(address, false).map_err(bind_error)?;
    let bound = first.local_addr().map_err(bind_error)?;
    if shared {
        drop(first);
        for list in lists {
            list.push(Bound::Tcp(listening(tcp_socket(bound, true).map_err(bind_error)?).map_err(bind_error)?));
        }
    } else if let Some(list) = lists.first_mut() {
        list.push(Bound::Tcp(listening(first).map_err(bind_error)?));
    }
    Ok(bound)
}

fn tcp_socket(address: SocketAddr, reuse_port: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A restart must not wait for connections in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket.into())
}

fn listening(listener: std::net::TcpListener) -> io::Result<std::net::TcpListener> {
    let socket = Socket::from(listener);
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn bind_unix(path: &Path, mode: u32, lists: &mut [Vec<Bound>]) -> Result<(), BindError> {
    let bind_error = |source| BindError { address: format!("unix:{}", path.display()), source };
    remove_stale(path).map_err(bind_error)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(bind_error)?;
    socket.bind(&SockAddr::unix(path).map_err(bind_error)?).map_err(bind_error)?;
    let file = Arc::new(SocketFile(path.to_owned()));
    // Nobody can connect before `listen`, so the mode is never too wide.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(bind_error)?;
    socket.listen(BACKLOG).map_err(bind_error)?;
    socket.set_nonblocking(true).map_err(bind_error)?;
    let listener = StdUnixListener::from(socket);
    for list in lists {
        list.push(Bound::Unix(listener.try_clone().map_err(bind_error)?, Arc::clone(&file)));
    }
    Ok(())
}

/// Removes the socket that a killed process left behind; one that answers, or anything that is not a socket, stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => match StdUnixStream::connect(path) {
            Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            Err(error) => Err(error),
        },
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is not a socket is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// The file of a Unix socket, removed at the end.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Gone already, or not ours to remove any more: nothing is left to do.
        let _ = fs::remove_file(&self.0);
    }
}

impl Bound {
    /// Registers the socket with the current thread's runtime.
    pub fn into_listener(self) -> io::Result<Listener> {
        match self {
            Self::Tcp(listener) => TcpListener::from_std(listener).map(Listener::Tcp),
            Self::Unix(listener, file) => UnixListener::from_std(listener).map(|listener| Listener::Unix(listener, file)),
        }
    }

    /// The TCP address; none for a Unix socket.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(..) => None,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(error) => write!(f, "unknown address: {error}"),
            },
            Self::Unix(_, file) => write!(f, "unix:{}", file.0.display()),
        }
    }
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A process of this host, through a Unix socket.
    Unix,
}

impl Peer {
    /// Whether it is a process of this host or Pod.
    pub fn is_local(&self) -> bool {
        match self {
            // An IPv4 address may come in IPv6 notation, through a listener at `[::]`.
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix => true,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix socket"),
        }
    }
}

impl Listener {
    /// The next connection. Cancel safe.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::Tcp(without_delay(stream)), Peer::Tcp(address)))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Stream::Unix(stream), Peer::Unix))
            }
        }
    }
}

fn without_delay(stream: TcpStream) -> TcpStream {
    // A socket that refuses the option works all the same, only slower.
    let _ = stream.set_nodelay(true);
    stream
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// D36, B27: `localhost` listens on both loopbacks, with one port.
    #[test]
    fn d36_localhost_is_both_loopbacks() {
        let lists = bind(&[ListenAddress::Localhost(0)], 0, 1).unwrap();
        let addresses: Vec<_> = lists[0].iter().filter_map(Bound::tcp_address).collect();
        assert_eq!(addresses[0].ip(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert_ne!(addresses[0].port(), 0);
        if let Some(second) = addresses.get(1) {
            assert_eq!((second.ip(), second.port()), (IpAddr::V6(Ipv6Addr::LOCALHOST), addresses[0].port()));
        }
    }

    /// D37: a busy port is an error that tells what to do, with one worker and with several.
    #[test]
    fn d37_a_busy_port_is_refused_even_with_reuse_port() {
        for workers in [1, 2] {
            let first = bind(&[ListenAddress::Socket("127.0.0.1:0".parse().unwrap())], 0, workers).unwrap();
            assert_eq!(first.iter().map(Vec::len).collect::<Vec<_>>(), vec![1; workers]);
            let address = first[0][0].tcp_address().unwrap();
            let error = bind(&[ListenAddress::Socket(address)], 0, workers).unwrap_err();
            assert!(error.to_string().contains("another process uses it"), "{error}");
        }
    }

    /// B35: the mode is set, a stale socket is replaced, a live one or another file is not, and nothing is left behind.
    #[test]
    fn b35_unix_sockets_are_private_and_clean_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy.sock");
        let address = [ListenAddress::Unix(path.clone())];
        drop(StdUnixListener::bind(&path).unwrap());
        let bound = bind(&address, 0o600, 2).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(bind(&address, 0o600, 1).unwrap_err().to_string().contains("another process uses it"));
        drop(bound);
        assert!(!path.exists());
        fs::write(&path, "mine").unwrap();
        assert!(bind(&address, 0o600, 1).unwrap_err().source.to_string().contains("not a socket"));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
