//! A way for the fuzz targets to a response's head and body.

use bytes::BytesMut;
use http::HeaderMap;

use super::Error;
use super::decode::Decoder;
use super::head;

/// What came of the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub struct UpstreamResponse {
    /// Of the first head, interim or not.
    pub status: u16,
    /// Its fields.
    pub headers: HeaderMap,
    /// All data frames.
    pub body: Vec<u8>,
    /// Where there are any.
    pub trailers: Option<HeaderMap>,
    /// What was not taken.
    pub leftover: Vec<u8>,
    /// Whether it is complete.
    pub ended: bool,
    /// Whether the connection may carry another, by what the response says.
    pub reusable: bool,
}

/// Reads a response as its bytes arrive; nothing while its head is not complete, or the words for what is wrong.
pub fn upstream_response<'a>(to_head: bool, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Option<UpstreamResponse>, String> {
    read(to_head, pieces).map_err(|error| error.to_string())
}

fn read<'a>(to_head: bool, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Option<UpstreamResponse>, Error> {
    let mut received = BytesMut::new();
    let mut decoder = Decoder::awaiting_head(to_head);
    let mut response: Option<UpstreamResponse> = None;
    for piece in pieces {
        received.extend_from_slice(piece);
        if response.is_none() {
            let Some(head) = head::take(&mut received)? else { continue };
            let reusable = decoder.begin(&head.parts)? && head.keep_alive;
            response = Some(UpstreamResponse {
                status: head.parts.status.as_u16(),
                headers: head.parts.headers,
                body: Vec::new(),
                trailers: None,
                leftover: Vec::new(),
                ended: false,
                reusable,
            });
        }
        let Some(response) = &mut response else { continue };
        while let Some(frame) = decoder.decode(&mut received)? {
            match frame.into_data() {
                Ok(data) => response.body.extend_from_slice(&data),
                Err(frame) => response.trailers = frame.into_trailers().ok(),
            }
        }
    }
    Ok(response.map(|response| UpstreamResponse { leftover: received.to_vec(), ended: decoder.is_ended(), ..response }))
}
