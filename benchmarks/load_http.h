/* Reading HTTP/1.1 responses without doing I/O: bytes go in, decoded body pieces come out.
 *
 * Enough for well-behaved servers: interim responses are skipped, bodies come by length, in chunks or
 * until the connection closes. Anything else is `BROKEN`.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum reading { READ_HEAD, READ_LENGTH, READ_UNTIL_CLOSE, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, COMPLETE, BROKEN };

enum { HEAD_LIMIT = 16 << 10, LINE_LIMIT = 256 };

struct response {
    enum reading state;
    int status;
    bool close;      /* the server will close, or already did */
    size_t left;     /* of the body or of this chunk */
    size_t head_size, line_size;
    char head[HEAD_LIMIT + 1], line[LINE_LIMIT + 1];
};

typedef void on_body(void *context, const char *data, size_t size);

static inline void response_reset(struct response *r) {
    r->state = READ_HEAD;
    r->status = 0;
    r->close = false;
    r->left = r->head_size = r->line_size = 0;
}

static inline void response_head(struct response *r) {
    bool chunked = false, sized = false;
    if (r->head_size < 12 || strncmp(r->head, "HTTP/1.", 7)) {
        r->state = BROKEN;
        return;
    }
    r->status = atoi(r->head + 9);
    if (r->status < 200) { /* 100, 102, 103: the real one follows */
        response_reset(r);
        return;
    }
    r->close = r->head[7] == '0';
    for (char *line = strstr(r->head, "\r\n"); line && line[2] != '\r'; line = strstr(line, "\r\n")) {
        line += 2;
        if (!strncasecmp(line, "content-length:", 15)) {
            sized = true;
            r->left = strtoul(line + 15, NULL, 10);
        } else if (!strncasecmp(line, "transfer-encoding: chunked", 26)) chunked = true;
        else if (!strncasecmp(line, "connection: close", 17)) r->close = true;
    }
    if (chunked) r->state = CHUNK_SIZE;
    else if (sized) r->state = r->left ? READ_LENGTH : COMPLETE;
    else {
        r->state = READ_UNTIL_CLOSE;
        r->close = true;
    }
}

/* Take one byte of a line that belongs to the framing. True at its end; r->line then holds it. */
static inline bool response_line(struct response *r, char byte) {
    if (byte != '\n') {
        if (byte != '\r' && r->line_size < LINE_LIMIT) r->line[r->line_size++] = byte;
        return false;
    }
    r->line[r->line_size] = 0;
    return true;
}

/* Feed bytes; returns how many were used (all, unless the response ended before). */
static inline size_t response_feed(struct response *r, const char *data, size_t size, on_body *body, void *context) {
    size_t at = 0;
    while (at < size && r->state != COMPLETE && r->state != BROKEN) {
        size_t here = size - at;
        switch (r->state) {
        case READ_HEAD:
            if (r->head_size == HEAD_LIMIT) {
                r->state = BROKEN;
                break;
            }
            r->head[r->head_size++] = data[at++];
            if (r->head_size >= 4 && !memcmp(r->head + r->head_size - 4, "\r\n\r\n", 4)) {
                r->head[r->head_size] = 0;
                response_head(r);
            }
            break;
        case READ_LENGTH:
        case CHUNK_DATA:
            if (here > r->left) here = r->left;
            body(context, data + at, here);
            at += here;
            r->left -= here;
            if (!r->left) r->state = r->state == READ_LENGTH ? COMPLETE : CHUNK_END;
            break;
        case READ_UNTIL_CLOSE:
            body(context, data + at, here);
            at = size;
            break;
        case CHUNK_SIZE:
            if (!response_line(r, data[at++])) break;
            r->left = strtoul(r->line, NULL, 16);
            r->state = !r->line_size ? BROKEN : r->left ? CHUNK_DATA : TRAILER;
            r->line_size = 0;
            break;
        case CHUNK_END:
        case TRAILER:
            if (!response_line(r, data[at++])) break;
            if (r->state == CHUNK_END) r->state = r->line_size ? BROKEN : CHUNK_SIZE;
            else if (!r->line_size) r->state = COMPLETE;
            r->line_size = 0;
            break;
        default:
            break;
        }
    }
    return at;
}
