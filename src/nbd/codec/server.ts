/** The server's codec: what clients say during the handshake, what we answer then, and the replies of transmission. */
export * from './option-replies.js';
export * from './options.js';
export * from './replies.js';
