//! The routes: minting, authorization, queries, bodies.

use serde_json::{Value, json};

use super::client::{Client, LIMIT, MINT, Seen, ask, content, mint_fields, start};
use crate::simulator::{byte_at, demo_credentials};

#[test]
fn a_mint_needs_its_headers_its_body_and_a_known_account() {
    let simulator = start();
    let good = mint_fields("a@example.com", "first");
    let rows = [
        ("/api-tokens/", good.clone(), MINT, 200),
        ("/api-tokens", good.clone(), MINT, 200),
        ("/api-tokens/", mint_fields("a@example.com", "wrong"), MINT, 403),
        ("/api-tokens/", mint_fields("b@example.com", "first"), MINT, 403),
        ("/api-tokens/", format!("{good}x-api-email: a@example.com\r\n"), MINT, 403),
        ("/api-tokens/", "content-type: application/json\r\n".to_owned(), MINT, 403),
        ("/api-tokens/", good.replace("application/json", "text/plain"), MINT, 400),
        ("/api-tokens/", good.clone(), r#"{"displayData":{"name":"n"}}"#, 400),
        ("/api-tokens/", good.clone(), "not JSON", 400),
    ];
    for (target, fields, body, expected) in rows {
        let (status, head, content) = ask(&simulator, "POST", target, &fields, body);
        assert_eq!(status, expected, "{target} {fields} {body}");
        assert!(head.contains("x-api-requestid: "), "{head}");
        let content: Value = serde_json::from_str(&content).unwrap();
        assert_eq!(content["apiToken"].is_string(), status == 200, "{content}");
    }
    let mints = simulator.mints();
    assert_eq!(mints.len(), 2);
    assert_eq!((mints[0].name.as_str(), mints[0].description.as_str(), mints[0].email.as_str()), ("n", "d", "a@example.com"));
    assert_eq!(simulator.live_tokens(), [mints[0].token.clone(), mints[1].token.clone()]);
    assert!(mints[0].token.len() == 32 && mints[0].token != mints[1].token);
}

#[test]
fn a_changed_password_mints_and_the_old_one_does_not() {
    let simulator = start();
    simulator.change_password("a@example.com", "second");
    let status = |password| ask(&simulator, "POST", "/api-tokens/", &mint_fields("a@example.com", password), MINT).0;
    assert_eq!((status("first"), status("second")), (403, 200));
    simulator.remove_account("a@example.com");
    assert_eq!(status("second"), 403);
}

#[test]
fn only_one_raw_live_token_is_accepted() {
    let simulator = start();
    let token = simulator.make_token();
    let status = |fields: &str| {
        let (status, head, content) = ask(&simulator, "GET", "/users", fields, "");
        assert!(head.contains("x-api-requestid: "), "{head}");
        assert_eq!(content.contains(r#""clazz":"ForbiddenException""#), status == 403, "{content}");
        status
    };
    let good = format!("authorization: {token}\r\n");
    assert_eq!(status(&good), 200);
    assert_eq!(status(""), 403);
    assert_eq!(status(&format!("authorization: Bearer {token}\r\n")), 403);
    assert_eq!(status(&good.repeat(2)), 403);
    assert_eq!(ask(&simulator, "GET", "/forbidden/thing", &good, "").0, 403);

    assert!(simulator.revoke(&token) && !simulator.revoke(&token));
    assert_eq!(status(&good), 403);
    simulator.ignore_authorization(true);
    assert_eq!(status(""), 200);
}

#[test]
fn a_token_is_deleted_by_its_id() {
    let simulator = start();
    ask(&simulator, "POST", "/api-tokens/", &mint_fields("a@example.com", "first"), MINT);
    let mint = &simulator.mints()[0];
    let keeper = simulator.make_token();
    let authorization = format!("authorization: {}\r\n", mint.token);
    assert_eq!(ask(&simulator, "DELETE", &format!("/api-tokens/{}", mint.id), &authorization, "").0, 204);
    assert_eq!(simulator.live_tokens(), [keeper]);
    assert_eq!(simulator.revoke_all(), 1);
}

#[test]
fn a_query_is_pending_then_paged() {
    let simulator = start();
    let authorization = format!("authorization: {}\r\ncontent-type: application/json\r\n", simulator.make_token());
    let ask = |method: &str, target: &str, body: &str| {
        let (status, _, content) = ask(&simulator, method, target, &authorization, body);
        (status, serde_json::from_str::<Value>(&content).unwrap())
    };
    let select = r#"{"sql":"SELECT 1"}"#;

    let (status, answer) = ask("POST", "/query", select);
    assert_eq!((status, &answer["status"]), (201, &json!("Pending")));
    let current = answer["current"].as_str().unwrap();
    let (status, answer) = ask("GET", current, "");
    assert_eq!((status, &answer["status"], &answer["current"]), (202, &json!("Pending"), &json!(current)));
    let (status, answer) = ask("GET", current, "");
    assert_eq!((status, &answer["status"], &answer["result"]["grid"]["data"][0][1]), (200, &json!("Success"), &json!("page 0")));
    let next = answer["result"]["next"].as_str().unwrap();
    let (status, answer) = ask("GET", next, "");
    assert_eq!((status, &answer["result"]["grid"]["data"][0][1], &answer["result"]["next"]), (200, &json!("page 1"), &Value::Null));
    assert_eq!(ask("GET", &format!("{current}/2"), "").0, 404);

    simulator.queries(0, 1);
    assert_eq!(ask("POST", "/query/", select).0, 200);
    let (status, answer) = ask("POST", "/query", r#"{"sql":"CREATE TABLE t"}"#);
    assert_eq!((status, answer["message"].is_string(), answer.get("result")), (200, true, None));
    assert_eq!(ask("POST", "/query", "{}").0, 400);
}

#[test]
fn the_other_routes_answer() {
    let simulator = start();
    let authorization = format!("authorization: {}\r\n", simulator.make_token());
    let ask = |method: &str, target: &str, body: &str| ask(&simulator, method, target, &authorization, body);

    let host = format!("localhost:{}", simulator.address().port());
    assert_eq!(ask("GET", "/environments/local-api", "").2, json!({ "dnsInfo": { "name": host } }).to_string());
    simulator.set_api_host("localhost:1");
    assert!(ask("GET", "/environments/local-api", "").2.contains("localhost:1\""));
    assert!(ask("GET", "/inputs/", "").2.starts_with('['));
    assert_eq!(ask("GET", "/nothing", "").0, 404);

    assert_eq!(ask("GET", "/bytes/many", "").0, 404);
}

#[test]
fn bodies_stream_in_both_framings() {
    let simulator = start();
    simulator.ignore_authorization(true);
    let mut client = Client::connect(&simulator);
    let get = |target: &str| format!("GET {target} HTTP/1.1\r\nhost: x\r\nte: trailers\r\nconnection: close\r\n\r\n");

    client.send(&get("/bytes/100000?framing=chunked"));
    let (mut reply, seen) = client.rest(LIMIT);
    assert!(reply.ends_with(b"\r\n0\r\n\r\n") && seen == Seen::CloseNotify);
    reply.truncate(reply.len() - 5);
    let (head, chunked) = content(&reply);
    assert!(head.contains("transfer-encoding: chunked") && chunked == (0..100_000).map(byte_at).collect::<Vec<_>>());

    let mut client = Client::connect(&simulator);
    client.send(&get("/bytes/100000"));
    let (head, sized) = content(&client.rest(LIMIT).0);
    assert!(head.contains("content-length: 100000") && sized == chunked);

    let mut client = Client::connect(&simulator);
    client.send(&get("/trailers"));
    assert!(String::from_utf8(client.rest(LIMIT).0).unwrap().ends_with("\r\n0\r\nx-checksum: simulated\r\n\r\n"));

    let mut client = Client::connect(&simulator);
    client.send(&get("/slow/3?every=1"));
    assert!(String::from_utf8(client.rest(LIMIT).0).unwrap().contains("line 2\n"));

    let mut client = Client::connect(&simulator);
    client.send("POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n");
    client.send("2\r\nde\r\n0\r\n\r\n");
    assert!(String::from_utf8(client.rest(LIMIT).0).unwrap().ends_with("\r\n0\r\n\r\n"));

    let sum = "36bbe50ed96841d10443bcb670d6554f0a34b761be67ec9c4a8ad2c0c44ca42c";
    assert_eq!(ask(&simulator, "POST", "/sink", "", "abcde").2, json!({ "bytes": 5, "sha256": sum }).to_string());
}

#[test]
fn the_pattern_shows_a_lost_buffer() {
    assert_eq!((byte_at(0), byte_at(250), byte_at(251)), (0, 250, 0));
    assert!([4096, 8192, 16384, 65536].iter().all(|&size| byte_at(size) != byte_at(0)));
}

#[test]
fn demo_credentials_differ_from_run_to_run() {
    let (one, two) = (demo_credentials(), demo_credentials());
    assert!(one.email != two.email && one.password != two.password && one.email.ends_with("@example.com"));
}
