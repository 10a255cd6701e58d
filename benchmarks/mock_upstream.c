/* A stand-in for llama-server that costs next to nothing, so that what is measured is the proxy.
 *
 * It takes llama-server's flags (host, port and slots are used, the rest is ignored), so a node can
 * start it as its engine. One thread, one epoll, keep-alive without limit, no authentication.
 *
 *   GET  /health, /props, /slots, /v1/models      what a supervisor asks for
 *   POST anything                                 one fixed completion of about 600 bytes, or, with
 *                                                 "stream": true, max_tokens server-sent events
 * Fields of the body that steer a stream (looked for as text, not parsed as JSON):
 *   max_tokens   number of content events (default 16)
 *   pace_ms      0: as fast as the socket takes them. N: one event each N ms, the first one N ms
 *                after the request; each then carries `sent_ns`, CLOCK_MONOTONIC at sending
 *   batch        unpaced only: events per write call (default 1, at most 128)
 *
 * Every event is an HTTP chunk of its own. Unpaced streams are served in turns, one write each, the
 * way an engine that decodes a batch gives each of its slots one token per step; a stream whose
 * socket is full sits out until it has room.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "mock_sets.h"

enum { MAX_HEAD = 64 << 10, READ_SIZE = 64 << 10, MAX_EVENTS = 256, MAX_BATCH = 128 };
#define MAX_BODY ((size_t)256 << 20)

static int epoll_fd, timer_fd, listen_fd, slots = 256;
static uint64_t timer_armed_for;
static char event_chunks[MAX_BATCH * 512], completion[1024];
static size_t event_chunk_size; /* of one of them; all unpaced events are the same bytes */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- connections --------------------------------------------------------------------------- */

static void want_write(struct conn *c, bool wanted) {
    if (c->waiting_to_write == wanted) return;
    c->waiting_to_write = wanted;
    struct epoll_event e = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
}

static void drop(struct conn *c) {
    hot_remove(c);
    heap_remove(c);
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
}

/* Send what is queued. False: the connection is gone. */
static bool flush(struct conn *c) {
    while (c->out.start < c->out.end) {
        ssize_t n = send(c->fd, c->out.data + c->out.start, c->out.end - c->out.start, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) {
                want_write(c, true);
                return true;
            }
            drop(c);
            return false;
        }
        c->out.start += (size_t)n;
    }
    c->out.start = c->out.end = 0;
    want_write(c, false);
    if (c->close_after && !c->streaming) {
        drop(c);
        return false;
    }
    return true;
}

static void accept_all(void) {
    int fd;
    while ((fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        c->heap_index = c->hot_index = -1;
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

/* ---- answers ------------------------------------------------------------------------------- */

static void answer(struct conn *c, const char *status, const char *body) {
    char head[256];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %s\r\nServer: mock\r\nContent-Type: application/json; charset=utf-8\r\n"
                     "Content-Length: %zu\r\n%s\r\n",
                     status, strlen(body), c->close_after ? "Connection: close\r\n" : "");
    append(&c->out, head, (size_t)n);
    append(&c->out, body, strlen(body));
}

/* Append one event as one chunk. A sent_ns of 0 leaves the time out. */
static size_t write_event(char *into, size_t room, uint64_t sent_ns) {
    char data[400], stamp[40] = "";
    if (sent_ns) snprintf(stamp, sizeof stamp, ",\"sent_ns\":%llu", (unsigned long long)sent_ns);
    int n = snprintf(data, sizeof data,
                     "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{\"content\":\" token\"}}],"
                     "\"created\":1700000000,\"id\":\"chatcmpl-ybC3mQ0vT7kUu1hZ5dWn8xJrS2pLe4Ga\",\"model\":\"bench\","
                     "\"system_fingerprint\":\"b1-mock\",\"object\":\"chat.completion.chunk\"%s}\n\n",
                     stamp);
    return (size_t)snprintf(into, room, "%x\r\n%s\r\n", (unsigned)n, data);
}

static void finish_stream(struct conn *c) {
    char data[600];
    int n = snprintf(data, sizeof data,
                     "data: {\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"delta\":{}}],"
                     "\"created\":1700000000,\"id\":\"chatcmpl-ybC3mQ0vT7kUu1hZ5dWn8xJrS2pLe4Ga\",\"model\":\"bench\","
                     "\"object\":\"chat.completion.chunk\",\"usage\":{\"completion_tokens\":%ld,\"prompt_tokens\":21,"
                     "\"total_tokens\":%ld},\"timings\":{\"cache_n\":0,\"prompt_n\":21,\"prompt_ms\":1.5,"
                     "\"predicted_n\":%ld,\"predicted_ms\":%ld.5}}\n\n",
                     c->tokens, c->tokens + 21, c->tokens, c->tokens);
    char chunks[800];
    n = snprintf(chunks, sizeof chunks, "%x\r\n%s\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", (unsigned)n, data);
    append(&c->out, chunks, (size_t)n);
    c->streaming = false;
    hot_remove(c);
    heap_remove(c);
}

static void next_requests(struct conn *c);

/* One turn of an unpaced stream: one write of `batch` events. */
static void turn(struct conn *c) {
    long n = c->left < c->batch ? c->left : c->batch;
    c->left -= n;
    append(&c->out, event_chunks, (size_t)n * event_chunk_size);
    if (!c->left) finish_stream(c);
    bool ended = !c->streaming;
    if (!flush(c)) return;
    if (ended) next_requests(c);
    else if (c->waiting_to_write) hot_remove(c);
}

static void send_due(void) {
    uint64_t now = now_ns();
    while (heap.count && heap.items[0]->due_ns <= now) {
        struct conn *c = heap.items[0];
        heap_remove(c);
        c->due_ns += c->pace_ns; /* from the schedule, not from now: lateness must not add up */
        c->left--;
        char chunk[512];
        append(&c->out, chunk, write_event(chunk, sizeof chunk, now_ns()));
        if (!c->left) finish_stream(c);
        else heap_add(c);
        bool ended = !c->streaming;
        if (flush(c) && ended) next_requests(c);
    }
}

static void arm_timer(void) {
    uint64_t due = heap.count ? heap.items[0]->due_ns : 0;
    if (due == timer_armed_for) return;
    timer_armed_for = due;
    struct itimerspec spec = {
        .it_value = {.tv_sec = (time_t)(due / 1000000000u), .tv_nsec = (long)(due % 1000000000u)}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

/* ---- requests ------------------------------------------------------------------------------ */

/* The text after `"name":` in a body, blanks skipped; NULL when it isn't there. */
static const char *field(const char *body, size_t size, const char *name) {
    const char *at = memmem(body, size, name, strlen(name)), *end = body + size;
    if (!at) return NULL;
    for (at += strlen(name); at < end && (*at == ' ' || *at == ':'); at++) {}
    return at < end ? at : NULL;
}

static long number(const char *body, size_t size, const char *name, long otherwise) {
    const char *at = field(body, size, name);
    return at && *at >= '0' && *at <= '9' ? strtol(at, NULL, 10) : otherwise;
}

static void answer_get(struct conn *c) {
    char body[256];
    if (!strcmp(c->path, "/health")) answer(c, "200 OK", "{\"status\":\"ok\"}");
    else if (!strcmp(c->path, "/slots")) answer(c, "200 OK", "[]");
    else if (!strcmp(c->path, "/v1/models"))
        answer(c, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\"}]}");
    else if (!strcmp(c->path, "/props")) {
        snprintf(body, sizeof body,
                 "{\"total_slots\":%d,\"default_generation_settings\":{\"n_ctx\":8192},\"model_path\":\"bench\"}", slots);
        answer(c, "200 OK", body);
    } else answer(c, "404 Not Found", "{\"error\":{\"code\":404,\"message\":\"File Not Found\",\"type\":\"not_found_error\"}}");
}

static void answer_post(struct conn *c, const char *body, size_t size) {
    const char *stream = field(body, size, "\"stream\"");
    if (!stream || strncmp(stream, "true", 4)) {
        answer(c, "200 OK", completion);
        return;
    }
    c->tokens = c->left = number(body, size, "\"max_tokens\"", 16);
    c->batch = number(body, size, "\"batch\"", 1);
    if (c->batch < 1 || c->batch > MAX_BATCH) c->batch = 1;
    c->pace_ns = (uint64_t)number(body, size, "\"pace_ms\"", 0) * 1000000u;
    c->streaming = true;
    static const char head[] = "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: text/event-stream\r\n"
                               "X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n";
    append(&c->out, head, sizeof head - 1);
    if (!c->left) finish_stream(c);
    else if (c->pace_ns) {
        c->due_ns = now_ns() + c->pace_ns;
        heap_add(c);
    } else hot_add(c);
}

static bool has(const char *value, const char *word) {
    return strcasestr(value, word) != NULL;
}

/* Read the head of length `size` at `head` (NUL-terminated by the caller at its end). */
static bool read_head(struct conn *c, char *head, size_t size) {
    char method[16], path[256], version[16];
    if (sscanf(head, "%15s %255s %15s", method, path, version) != 3) return false;
    path[strcspn(path, "?")] = 0;
    snprintf(c->path, sizeof c->path, "%.63s", path);
    c->is_post = !strcmp(method, "POST");
    c->close_after = !strcmp(version, "HTTP/1.0");
    c->chunked = false;
    c->body_length = 0;
    for (char *line = strstr(head, "\r\n"); line && line[2]; line = strstr(line, "\r\n")) {
        line += 2;
        char *value = strchr(line, ':'), *end = strstr(line, "\r\n");
        if (!value || !end) break;
        char kept = *end;
        *end = 0;
        if (!strncasecmp(line, "content-length:", 15)) c->body_length = strtoul(value + 1, NULL, 10);
        else if (!strncasecmp(line, "transfer-encoding:", 18)) c->chunked = has(value, "chunked");
        else if (!strncasecmp(line, "connection:", 11) && has(value, "close")) c->close_after = true;
        else if (!strncasecmp(line, "expect:", 7)) append(&c->out, "HTTP/1.1 100 Continue\r\n\r\n", 25);
        *end = kept;
        line = end;
    }
    c->body_start = c->chunk_at = size;
    c->head_done = true;
    return c->body_length <= MAX_BODY;
}

/* Decode chunks in place, behind the head. 1: whole, 0: more is needed, -1: broken. */
static int read_chunks(struct conn *c) {
    char *base = c->in.data + c->in.start;
    size_t have = c->in.end - c->in.start;
    for (;;) {
        char *line = base + c->chunk_at, *eol = memmem(line, have - c->chunk_at, "\r\n", 2);
        if (!eol) return have - c->chunk_at > 1024 ? -1 : 0;
        size_t size = strtoul(line, NULL, 16), data_at = (size_t)(eol - base) + 2;
        if (size > MAX_BODY || c->body_length + size > MAX_BODY) return -1;
        if (have < data_at + size + 2) return 0; /* trailers are not understood: the last chunk ends by an empty line */
        memmove(base + c->body_start + c->body_length, base + data_at, size);
        c->body_length += size;
        c->chunk_at = data_at + size + 2;
        if (!size) return 1;
    }
}

/* Answer every whole request in the buffer, until one of them becomes a stream. */
static void next_requests(struct conn *c) {
    while (!c->streaming && c->in.start < c->in.end) {
        char *base = c->in.data + c->in.start;
        size_t have = c->in.end - c->in.start;
        if (!c->head_done) {
            char *end = memmem(base, have, "\r\n\r\n", 4);
            if (!end && have < MAX_HEAD) return;
            if (end) end[2] = 0; /* read_head works on text; the byte isn't needed again */
            if (!end || !read_head(c, base, (size_t)(end - base) + 4)) {
                drop(c);
                return;
            }
        }
        int whole = c->chunked ? read_chunks(c) : have >= c->body_start + c->body_length;
        if (whole < 0) {
            drop(c);
            return;
        }
        if (!whole) {
            if (c->out.end) flush(c); /* a 100 Continue */
            return;
        }
        if (c->is_post) answer_post(c, base + c->body_start, c->body_length);
        else answer_get(c);
        c->in.start += c->chunked ? c->chunk_at : c->body_start + c->body_length;
        c->head_done = false;
        if (!flush(c)) return;
    }
}

static void on_readable(struct conn *c) {
    char *into = reserve(&c->in, READ_SIZE + 1); /* one more for the parsers' NUL */
    ssize_t n = recv(c->fd, into, READ_SIZE, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN)) {
        drop(c);
        return;
    }
    if (n > 0) {
        c->in.end += (size_t)n;
        c->in.data[c->in.end] = 0;
        next_requests(c);
    }
}

/* ---- start --------------------------------------------------------------------------------- */

static void listen_on(const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (!inet_pton(AF_INET, strcmp(host, "localhost") ? host : "127.0.0.1", &address.sin_addr)) die("--host");
    listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int one = 1;
    setsockopt(listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listen_fd, (struct sockaddr *)&address, sizeof address) || listen(listen_fd, 1024)) die("couldn't bind");
    socklen_t size = sizeof address;
    getsockname(listen_fd, (struct sockaddr *)&address, &size);
    printf("n_slots = %d\nn_ctx = 8192\nlistening on http://%s:%d\n", slots, host, ntohs(address.sin_port));
    fflush(stdout);
}

int main(int argc, char **argv) {
    const char *host = "127.0.0.1";
    int port = 8080;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--version") || !strcmp(argv[i], "--help")) {
            puts("version: 0 (mock)");
            return 0;
        }
        if (i + 1 == argc) break;
        if (!strcmp(argv[i], "--host")) host = argv[++i];
        else if (!strcmp(argv[i], "--port")) port = atoi(argv[++i]);
        else if (!strcmp(argv[i], "-np") || !strcmp(argv[i], "--parallel")) slots = atoi(argv[++i]);
    }
    signal(SIGPIPE, SIG_IGN);
    event_chunk_size = write_event(event_chunks, sizeof event_chunks, 0);
    for (size_t i = 1; i < MAX_BATCH; i++) memcpy(event_chunks + i * event_chunk_size, event_chunks, event_chunk_size);
    snprintf(completion, sizeof completion,
             "{\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\" token\"}}],"
             "\"created\":1700000000,\"model\":\"bench\",\"system_fingerprint\":\"b1-mock\",\"object\":\"chat.completion\","
             "\"usage\":{\"completion_tokens\":1,\"prompt_tokens\":21,\"total_tokens\":22,\"prompt_tokens_details\":"
             "{\"cached_tokens\":0}},\"id\":\"chatcmpl-ybC3mQ0vT7kUu1hZ5dWn8xJrS2pLe4Ga\",\"timings\":{\"cache_n\":0,"
             "\"prompt_n\":21,\"prompt_ms\":0.442,\"prompt_per_token_ms\":0.021,\"prompt_per_second\":47511.312,"
             "\"predicted_n\":1,\"predicted_ms\":0.127,\"predicted_per_token_ms\":0.127,\"predicted_per_second\":7874.015}}");
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    listen_on(host, port);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = &listen_fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listen_fd, &e);
    e.data.ptr = &timer_fd;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
    struct epoll_event events[MAX_EVENTS];
    for (;;) {
        arm_timer();
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, hot.count ? 0 : -1);
        /* Nothing here closes another connection than its own, so no later event of this batch is stale. */
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (events[i].data.ptr == &listen_fd) accept_all();
            else if (events[i].data.ptr == &timer_fd) {
                uint64_t ticks;
                if (read(timer_fd, &ticks, sizeof ticks) > 0) timer_armed_for = 0;
            } else if (events[i].events & EPOLLOUT) {
                if (flush(c) && !c->waiting_to_write && c->streaming && !c->pace_ns) hot_add(c);
            } else on_readable(c);
        }
        send_due();
        for (int round = 0; round < 16 && hot.count; round++)
            for (long i = hot.count - 1; i >= 0; i--) /* backwards: a turn may take its stream out of the set */
                if (i < hot.count) turn(hot.items[i]);
    }
}
