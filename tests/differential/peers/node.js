// Records every complete request and answers with what it saw; node.js PORT RECORD.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');

const [port, record] = process.argv.slice(2);

const server = http.createServer((request, response) => {
  const hash = crypto.createHash('sha256');
  let length = 0;
  const early = request.url.includes('/early/');
  const answer = (...body) => {
    response.setHeader('X-Echo', [request.method, ...body].join('/'));
    response.end('seen');
  };
  if (early) answer('-', '-');
  request.on('data', (data) => { hash.update(data); length += data.length; });
  request.on('end', () => {
    const digest = hash.digest('hex').slice(0, 16);
    fs.appendFileSync(record, JSON.stringify([request.socket.remoteAddress, request.method, request.url, length, digest]) + '\n');
    if (!early) answer(length, digest);
  });
});
server.keepAliveTimeout = 300000;
server.requestTimeout = 0;
server.listen(Number(port), '127.0.0.1', 4096);
