//! `POST /query`, its polls and its pages, as far as Upsolver's own clients look.
//!
//! What is fixed comes from the pollers of `upsolver-sdk-python` 0.1.12 and `upsolver-cli` 0.6.4: 201, then 202, with `status` "Pending" and the next
//! path in `current`; then 200 with `status` "Success" and `result.grid` of `columns` and `data`, the path of the next page in `result.next`; a
//! statement without rows has a `message` instead of a `result`. Values of `kind` beyond `upsolver_query_response` are our own.

use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::api::{json, no_such_path, refuse};
use super::body::Body;
use super::control::{Control, State};

/// A query that was sent and may still be polled or paged.
pub(super) struct Query {
    statement: String,
    polls_left: u32,
    pages: u32,
}

/// So many queries are remembered; older ones answer 404.
const MAX_QUERIES: usize = 1024;

/// Answers `/query` and what is below it; `rest` is the path behind `/query`, without outer slashes.
pub(super) fn respond(control: &Control, method: &Method, rest: &str, body: &[u8]) -> Response<Body> {
    if rest.is_empty() {
        return if method == Method::POST { create(control, body) } else { no_such_path() };
    }
    let (id, page) = rest.split_once('/').unwrap_or((rest, "0"));
    match (id.parse(), page.parse()) {
        (Ok(id), Ok(page)) if method == Method::GET => fetch(&mut control.state(), id, page).unwrap_or_else(no_such_path),
        _ => no_such_path(),
    }
}

fn create(control: &Control, body: &[u8]) -> Response<Body> {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let Some(statement) = body["sql"].as_str().map(str::trim).filter(|sql| !sql.is_empty()) else {
        return refuse(StatusCode::BAD_REQUEST, "BadRequestException", "the body must be a JSON object with a non-empty \"sql\"");
    };
    let state = &mut *control.state();
    let id = state.queries.last_key_value().map_or(1, |(last, _)| last + 1);
    if state.queries.len() == MAX_QUERIES {
        state.queries.pop_first();
    }
    let query = Query { statement: statement.to_owned(), polls_left: state.pending_polls, pages: state.pages.max(1) };
    let answer = if query.polls_left > 0 { pending(StatusCode::CREATED, id) } else { query.page(id, 0).expect("there is a first page") };
    state.queries.insert(id, query);
    answer
}

fn fetch(state: &mut State, id: u64, page: u32) -> Option<Response<Body>> {
    let query = state.queries.get_mut(&id)?;
    query.polls_left = query.polls_left.saturating_sub(1);
    if query.polls_left > 0 { Some(pending(StatusCode::ACCEPTED, id)) } else { query.page(id, page) }
}

fn pending(status: StatusCode, id: u64) -> Response<Body> {
    json(status, &json!({ "status": "Pending", "kind": "upsolver_pending_query_response", "current": format!("/query/{id}") }))
}

impl Query {
    /// Two rows per page, each with the page and its number in it. `None` past the last page.
    fn page(&self, id: u64, page: u32) -> Option<Response<Body>> {
        if page >= self.pages {
            return None;
        }
        let has_rows =
            self.statement.get(..6).is_some_and(|verb| verb.eq_ignore_ascii_case("select") || verb.eq_ignore_ascii_case("values"));
        if !has_rows {
            let message = "the statement was executed by the simulated API";
            return Some(json(StatusCode::OK, &json!({ "status": "Success", "kind": "upsolver_query_response", "message": message })));
        }
        let column = |name| json!({ "name": name, "columnType": { "clazz": "StringColumnType" } });
        let row = |number| json!([format!("{number}"), format!("page {page}"), self.statement]);
        let mut result = json!({
            "grid": { "columns": [column("row"), column("page"), column("statement")], "data": [row(2 * page), row(2 * page + 1)] },
        });
        if page + 1 < self.pages {
            result["next"] = format!("/query/{id}/{}", page + 1).into();
        }
        Some(json(StatusCode::OK, &json!({ "status": "Success", "kind": "upsolver_grid_query_response", "result": result })))
    }
}
