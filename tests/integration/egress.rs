//! Through an egress proxy (contract section 3, `upstream.proxy`): a tunnel for everything, TLS verified end to end inside it, its password for it alone.

use upsolver_auth_proxy::simulator::{Account, Options, Protocols, Simulator};

use crate::support::egress::{EgressProxy, Tunnel};
use crate::support::proxy::{Builder, Proxy, canary};
use crate::support::raw::ClosedPort;

fn simulator(protocols: Protocols) -> (Simulator, Account) {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let options = Options { accounts: vec![account.clone()], protocols, ..Options::default() };
    (Simulator::start(options).expect("a free port"), account)
}

/// A proxy that has a token, so that nothing but the test's request goes out.
fn with_token(simulator: &Simulator, configure: impl FnOnce(Builder) -> Builder) -> Proxy {
    let builder = Builder::to_simulator_without_credentials(simulator);
    let token = simulator.make_token();
    let file = builder.file("token", &token);
    configure(builder.secret(&token).set(format!("credentials.token_file={}", file.display()))).start()
}

#[test]
fn b45_everything_goes_through_the_tunnel_and_its_password_ends_there() {
    for (protocols, version) in [(Protocols::Http1, "1.1"), (Protocols::Http2, "2"), (Protocols::Both, "auto")] {
        let (simulator, account) = simulator(protocols);
        let egress = EgressProxy::start(Tunnel::Open);
        let password = canary("egress");
        let proxy = Builder::to_simulator(&simulator, &account)
            .secret(&password)
            .env("UPSOLVER_AUTH_PROXY__UPSTREAM__PROXY", format!("http://carrier:{password}@{}", egress.address()))
            .set(format!("upstream.http_version={version}"))
            .start();
        proxy.wait_ready();
        assert_eq!(proxy.get("/inputs/").status(), 200);
        let answer = proxy.get("/bytes/300000");
        assert!(answer.complete && answer.body.len() == 300_000, "{protocols:?}");

        let seen = egress.seen();
        let target = format!("localhost:{}", simulator.address().port());
        assert!(seen.len() >= 2, "the mint, and the requests");
        for head in &seen {
            assert_eq!(head.start, format!("CONNECT {target} HTTP/1.1"));
            assert_eq!(head.header("host"), Some(target.as_str()));
            assert!(head.header("proxy-authorization").is_some_and(|value| value.starts_with("Basic ")), "{:?}", head.start);
            assert!(head.header("authorization").is_none() && head.header("x-api-password").is_none(), "{:?}", head.start);
        }
        assert_eq!(simulator.counters().accepted, seen.len() as u64, "no connection went past it");
        assert!(simulator.requests().iter().all(|request| request.header_all("proxy-authorization").is_empty()), "{protocols:?}");
    }
}

#[test]
fn b45_a_tunnel_that_does_not_come_up_is_told() {
    let (simulator, _) = simulator(Protocols::Http1);
    for status in [403, 407, 502] {
        let egress = EgressProxy::start(Tunnel::Refuse(status));
        let proxy = with_token(&simulator, |builder| builder.set(format!("upstream.proxy=http://{}", egress.address())));
        let answer = proxy.get("/inputs/");
        assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_unreachable"), "{status}");
        assert!(proxy.wait_for_log("egress proxy").contains(&egress.address().to_string()), "{status}: the log names it");
        proxy.wait_until("the count", |proxy| proxy.metric("upsolver_auth_proxy_upstream_connects_total{result=\"proxy\"}") >= 1.0);
        assert_eq!(egress.seen().len(), 1, "{status}: tried once");
    }
    let egress = EgressProxy::start(Tunnel::Silence);
    let proxy = with_token(&simulator, |builder| {
        builder.set(format!("upstream.proxy=http://{}", egress.address())).set("upstream.connect_timeout=300ms")
    });
    let answer = proxy.get("/inputs/");
    assert_eq!((answer.status(), answer.code().as_str()), (504, "upstream_timeout"));
    let closed = ClosedPort::reserve();
    let gone = closed.address();
    let proxy = with_token(&simulator, |builder| builder.set(format!("upstream.proxy=http://{gone}")));
    let answer = proxy.get("/inputs/");
    assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_unreachable"));
    assert_eq!(simulator.counters().accepted, 0, "nothing ever goes past a configured egress proxy");
}

/// The name is looked up where the tunnel ends, unless `upstream.resolve` says the address; TLS verifies the name in either case.
#[test]
fn b45_the_tunnel_takes_the_address_of_upstream_resolve() {
    let (simulator, _) = simulator(Protocols::Http1);
    let egress = EgressProxy::start(Tunnel::Open);
    let proxy = with_token(&simulator, |builder| {
        builder
            .set("upstream.url=https://api.upsolver.com")
            .set(format!("upstream.resolve={}", simulator.address()))
            .set(format!("upstream.proxy=http://{}", egress.address()))
    });
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(egress.seen()[0].start, format!("CONNECT {} HTTP/1.1", simulator.address()));
    assert_eq!(simulator.requests()[0].header("host"), Some("api.upsolver.com"));
}

/// The usual variables: `HTTPS_PROXY` counts, `NO_PROXY` and this machine's own names go past it, `HTTP_PROXY` and `ALL_PROXY` mean nothing.
#[test]
fn b45_the_environment_names_the_egress_proxy() {
    let (simulator, _) = simulator(Protocols::Http1);
    let egress = EgressProxy::start(Tunnel::Open);
    let url = format!("http://{}", egress.address());
    // A name that is not this machine's, found by `upstream.resolve`.
    let start = |variables: &[(&str, &str)]| {
        with_token(&simulator, |builder| {
            let builder = builder.set("upstream.url=https://api.upsolver.com").set(format!("upstream.resolve={}", simulator.address()));
            variables.iter().fold(builder, |builder, (name, value)| builder.env(name, *value))
        })
    };
    for (variables, through) in [
        (&[("HTTPS_PROXY", url.as_str())][..], true),
        (&[("https_proxy", url.as_str())], true),
        (&[("HTTPS_PROXY", url.as_str()), ("NO_PROXY", "example.com")], true),
        (&[("HTTPS_PROXY", url.as_str()), ("NO_PROXY", "example.com,.upsolver.com")], false),
        (&[("HTTPS_PROXY", url.as_str()), ("no_proxy", "*")], false),
        (&[("HTTP_PROXY", url.as_str()), ("http_proxy", url.as_str()), ("ALL_PROXY", url.as_str())], false),
    ] {
        let before = egress.seen().len();
        let proxy = start(variables);
        assert_eq!(proxy.get("/inputs/").status(), 200, "{variables:?}");
        assert_eq!(egress.seen().len() > before, through, "{variables:?}");
    }
}
