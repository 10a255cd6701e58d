/* The client side of the benchmarks: one thread, one epoll, one JSON object on stdout at the end.
 *
 *   load requests --connections 8 --seconds 3      closed loop: each connection sends its next
 *                                                  request when the last is answered
 *   load stream --connections 32 --seconds 2       the same with server-sent events, unpaced
 *   load paced --connections 64 --pace-ms 20       one stream per connection, dialled when it starts;
 *                                                  starts spread over a second, or --burst: all at once
 *
 * When the seconds are over no new request begins, but those that run are read to their end, so that
 * what was counted here can be compared with what a server counted. A connection that the server closed
 * between two requests is dialled again and the request repeated (`retried`), as any client does.
 * A stream must end with `data: [DONE]`; one that doesn't counts as an error.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "load_http.h"

enum { READ_SIZE = 256 << 10, KEPT_LIMIT = 64 << 10, MAX_EVENTS = 256 };
enum mode { REQUESTS, STREAM, PACED };

struct samples {
    double *values;
    size_t count, capacity;
};

struct conn {
    int fd; /* -1: not connected */
    bool active, reused, answered, sending, done, failed;
    size_t sent;
    uint64_t begin_at, begun, first, last; /* ns; begin_at only in paced mode */
    long tokens;
    struct response response;
    size_t kept_size;       /* an unfinished line of a stream, or the body of another answer */
    char kept[KEPT_LIMIT + 1];
};

static struct {
    enum mode mode;
    int port, connections;
    double seconds, timeout;
    long requests, max_tokens, pace_ms, batch;
    const char *host, *path, *model;
    bool burst;
    char headers[4096];
} options = {.port = 8080, .connections = 8, .seconds = 2, .timeout = 60, .requests = -1, .max_tokens = 1,
             .host = "127.0.0.1", .path = "/v1/chat/completions", .model = "bench"};

static struct {
    long begun, ok, not_200, broken, missing_done, retried, connects, reads, events, tokens, completion_tokens;
    uint64_t bytes;
    struct samples latency, first_token, inter_token, transit, rate;
} total;

static int epoll_fd;
static char *request, *buffer;
static size_t request_size;
static uint64_t started, ended, stop_at, read_at; /* read_at: when the bytes in hand were read */

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(2);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double ms(uint64_t from, uint64_t to) { return ((double)to - (double)from) / 1e6; }

static void add(struct samples *s, double value) {
    if (s->count == s->capacity) {
        s->capacity = s->capacity ? s->capacity * 2 : 1024;
        if (!(s->values = realloc(s->values, s->capacity * sizeof *s->values))) fail("realloc");
    }
    s->values[s->count++] = value;
}

/* ---- one answer ---------------------------------------------------------------------------- */

static long number_after(const char *text, size_t size, const char *name) {
    const char *at = memmem(text, size, name, strlen(name));
    return at ? strtol(at + strlen(name), NULL, 10) : 0;
}

/* One line of a stream, without its newline; NUL or newline follows in memory. */
static void on_line(struct conn *c, const char *line, size_t size) {
    if (size < 6 || memcmp(line, "data: ", 6)) return; /* blank, comment, other field */
    if (size >= 12 && !memcmp(line, "data: [DONE]", 12)) {
        c->done = true;
        return;
    }
    total.events++;
    /* Content first: nearly every event has some. The first of a stream may carry `null`, the last none. */
    if (memmem(line, size, "\"content\":\"", 11)) {
        total.tokens++;
        if (!c->tokens++) c->first = read_at;
        else if (options.mode == PACED) add(&total.inter_token, ms(c->last, read_at));
        c->last = read_at;
        if (options.mode == PACED) {
            const char *at = memmem(line, size, "\"sent_ns\":", 10);
            if (at) add(&total.transit, ms(strtoull(at + 10, NULL, 10), read_at));
        }
        return;
    }
    total.completion_tokens += number_after(line, size, "\"completion_tokens\":");
    if (memmem(line, size, "\"error\"", 7)) c->failed = true;
}

static void keep(struct conn *c, const char *data, size_t size) {
    if (size > KEPT_LIMIT - c->kept_size) size = KEPT_LIMIT - c->kept_size;
    memcpy(c->kept + c->kept_size, data, size);
    c->kept[c->kept_size += size] = 0;
}

static void on_piece(void *context, const char *data, size_t size) {
    struct conn *c = context;
    if (options.mode == REQUESTS || c->response.status != 200) {
        keep(c, data, size);
        return;
    }
    const char *end = data + size, *newline;
    while (data < end && (newline = memchr(data, '\n', (size_t)(end - data)))) {
        if (c->kept_size) {
            keep(c, data, (size_t)(newline - data));
            on_line(c, c->kept, c->kept_size);
            c->kept_size = 0;
        } else on_line(c, data, (size_t)(newline - data));
        data = newline + 1;
    }
    keep(c, data, (size_t)(end - data));
}

/* ---- one connection ------------------------------------------------------------------------ */

static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void want(struct conn *c, bool writing, int operation) {
    struct epoll_event e = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &e)) fail("epoll_ctl");
    c->sending = writing;
}

static void lost(struct conn *c);

static void send_rest(struct conn *c) {
    ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        lost(c);
        return;
    }
    if (n > 0) c->sent += (size_t)n;
    if (c->sending != (c->sent < request_size)) want(c, !c->sending, EPOLL_CTL_MOD);
}

static void dial(struct conn *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    if (inet_pton(AF_INET, options.host, &to.sin_addr) != 1) fail("--host");
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) < 0) fail("socket");
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    total.connects++;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) fail("connect");
    want(c, true, EPOLL_CTL_ADD); /* connected: writable; refused: send says so */
}

static void transmit(struct conn *c) {
    c->sent = 0;
    c->answered = false;
    response_reset(&c->response);
    c->kept_size = 0;
    c->reused = c->fd >= 0;
    if (c->reused) send_rest(c);
    else dial(c);
}

static void begin(struct conn *c) {
    c->active = true;
    c->done = c->failed = false;
    c->tokens = 0;
    c->begun = now_ns();
    total.begun++;
    transmit(c);
}

static bool more_to_begin(void) {
    if (options.mode == PACED) return false; /* each has its one start */
    if (options.requests >= 0) return total.begun < options.requests;
    return now_ns() < stop_at;
}

/* The server may have closed a connection that waited for its next request; nothing was lost then. */
static void lost(struct conn *c) {
    hang_up(c);
    if (!c->active) return;
    if (c->reused && !c->answered) {
        total.retried++;
        transmit(c);
        return;
    }
    c->active = false;
    total.broken++;
    ended = now_ns();
    if (more_to_begin()) begin(c);
}

static void complete(struct conn *c) {
    c->active = false;
    ended = read_at;
    if (c->response.status != 200) total.not_200++;
    else if (c->failed) total.broken++;
    else if (options.mode != REQUESTS && !c->done) total.missing_done++;
    else total.ok++;
    if (options.mode == REQUESTS) total.completion_tokens += number_after(c->kept, c->kept_size, "\"completion_tokens\":");
    add(&total.latency, ms(c->begun, read_at));
    if (c->tokens) add(&total.first_token, ms(c->begun, c->first));
    if (c->tokens > 1 && c->last > c->first) add(&total.rate, (double)(c->tokens - 1) * 1e3 / ms(c->first, c->last));
    if (c->response.close) hang_up(c);
    if (more_to_begin()) begin(c);
}

static void on_readable(struct conn *c) {
    ssize_t n = recv(c->fd, buffer, READ_SIZE, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n == 0 && c->active && c->response.state == READ_UNTIL_CLOSE) {
        complete(c);
        return;
    }
    if (n <= 0 || !c->active) { /* gone, or bytes that nobody asked for */
        lost(c);
        return;
    }
    read_at = now_ns();
    total.reads++;
    total.bytes += (uint64_t)n;
    c->answered = true;
    size_t used = response_feed(&c->response, buffer, (size_t)n, on_piece, c);
    if (c->response.state == BROKEN || used < (size_t)n) lost(c);
    else if (c->response.state == COMPLETE) complete(c);
}

/* ---- the report ---------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_samples(const char *name, struct samples *s) {
    if (!s->count) return;
    qsort(s->values, s->count, sizeof *s->values, ascending);
    printf(",\"%s\":{\"count\":%zu", name, s->count);
    static const struct { const char *name; double at; } points[] = {
        {"min", 0}, {"p50", 0.5}, {"p90", 0.9}, {"p95", 0.95}, {"p99", 0.99}, {"max", 1}};
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        printf(",\"%s\":%.4f", points[i].name, s->values[(size_t)(points[i].at * (double)(s->count - 1) + 0.5)]);
    printf("}");
}

static void report(long unfinished) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    double took = ms(started, ended ? ended : now_ns()) / 1e3;
    double cpu = (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) + (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
    printf("{\"seconds\":%.4f,\"begun\":%ld,\"ok\":%ld,\"not_200\":%ld,\"broken\":%ld,\"missing_done\":%ld,\"unfinished\":%ld",
           took, total.begun, total.ok, total.not_200, total.broken, total.missing_done, unfinished);
    printf(",\"retried\":%ld,\"connects\":%ld,\"bytes\":%llu,\"reads\":%ld,\"events\":%ld,\"tokens\":%ld,\"completion_tokens\":%ld",
           total.retried, total.connects, (unsigned long long)total.bytes, total.reads, total.events, total.tokens, total.completion_tokens);
    printf(",\"requests_per_s\":%.2f,\"events_per_s\":%.2f,\"events_per_read\":%.2f,\"client_cpu_percent\":%.1f",
           (double)total.ok / took, (double)total.events / took,
           total.reads ? (double)total.events / (double)total.reads : 0.0, cpu / took * 100);
    print_samples("latency_ms", &total.latency);
    print_samples("first_token_ms", &total.first_token);
    print_samples("inter_token_ms", &total.inter_token);
    print_samples("transit_ms", &total.transit);
    print_samples("stream_tokens_per_s", &total.rate);
    printf("}\n");
}

/* ---- start --------------------------------------------------------------------------------- */

static void parse(int argc, char **argv) {
    static const char *const modes[] = {"requests", "stream", "paced"};
    int mode = 0;
    while (mode < 3 && (argc < 2 || strcmp(argv[1], modes[mode]))) mode++;
    if (mode == 3) {
        fprintf(stderr, "usage: load requests|stream|paced [--host H] [--port N] [--path P] [--model M] [--header 'K: V']\n"
                        "  [--connections N] [--seconds S] [--requests N] [--max-tokens N] [--pace-ms N] [--batch N]\n"
                        "  [--burst] [--timeout S]\n");
        exit(2);
    }
    options.mode = (enum mode)mode;
    for (int i = 2; i < argc; i++) {
        const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(flag, "--burst")) {
            options.burst = true;
            continue;
        }
        i++;
        if (!strcmp(flag, "--host")) options.host = value;
        else if (!strcmp(flag, "--port")) options.port = atoi(value);
        else if (!strcmp(flag, "--path")) options.path = value;
        else if (!strcmp(flag, "--model")) options.model = value;
        else if (!strcmp(flag, "--connections")) options.connections = atoi(value);
        else if (!strcmp(flag, "--seconds")) options.seconds = atof(value);
        else if (!strcmp(flag, "--timeout")) options.timeout = atof(value);
        else if (!strcmp(flag, "--requests")) options.requests = atol(value);
        else if (!strcmp(flag, "--max-tokens")) options.max_tokens = atol(value);
        else if (!strcmp(flag, "--pace-ms")) options.pace_ms = atol(value);
        else if (!strcmp(flag, "--batch")) options.batch = atol(value);
        else if (!strcmp(flag, "--header") && strlen(options.headers) + strlen(value) + 3 < sizeof options.headers)
            strcat(strcat(options.headers, value), "\r\n");
        else {
            fprintf(stderr, "load: unknown option %s\n", flag);
            exit(2);
        }
    }
}

static void build_request(void) {
    char steer[128] = "", *body;
    if (options.pace_ms) snprintf(steer, sizeof steer, ",\"pace_ms\":%ld", options.pace_ms);
    if (options.batch) snprintf(steer + strlen(steer), sizeof steer - strlen(steer), ",\"batch\":%ld", options.batch);
    int size = asprintf(&body, "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],"
                               "\"max_tokens\":%ld%s%s}",
                        options.model, options.max_tokens, options.mode == REQUESTS ? "" : ",\"stream\":true", steer);
    int whole = asprintf(&request, "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s",
                         options.path, options.host, options.port, options.headers, size, body);
    if (size < 0 || whole < 0) fail("asprintf");
    request_size = (size_t)whole;
    free(body);
}

int main(int argc, char **argv) {
    parse(argc, argv);
    build_request();
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct conn *conns = calloc((size_t)options.connections, sizeof *conns);
    if (!conns || !(buffer = malloc(READ_SIZE + 1))) fail("malloc");
    buffer[READ_SIZE] = 0;
    started = now_ns();
    stop_at = started + (uint64_t)(options.seconds * 1e9);
    uint64_t give_up_at = stop_at + (uint64_t)(options.timeout * 1e9);
    int pending = 0; /* paced streams whose start lies ahead; they start in order */
    for (int i = 0; i < options.connections; i++) {
        conns[i].fd = -1;
        conns[i].begin_at = started + (options.burst ? 0 : (uint64_t)i * 1000000000u / (uint64_t)options.connections);
        if (options.mode != PACED && (options.requests < 0 || total.begun < options.requests)) begin(&conns[i]);
    }
    struct epoll_event events[MAX_EVENTS];
    for (;;) {
        uint64_t now = now_ns();
        while (options.mode == PACED && pending < options.connections && conns[pending].begin_at <= now) begin(&conns[pending++]);
        bool waiting = options.mode == PACED && pending < options.connections;
        long active = 0;
        for (int i = 0; i < options.connections; i++) active += conns[i].active;
        if ((!active && !waiting) || now >= give_up_at) {
            report(active);
            return 0;
        }
        uint64_t until = waiting ? conns[pending].begin_at : give_up_at;
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, until > now ? (int)((until - now) / 1000000u) + 1 : 0);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (c->fd < 0) continue;
            if (c->sending && events[i].events & EPOLLOUT) send_rest(c);
            else on_readable(c);
        }
    }
}
