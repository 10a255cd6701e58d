/* What the mock upstream keeps: growing buffers, connections, and two sets of them.
 *
 * `heap` holds the paced streams, earliest due first; `hot` the unpaced ones whose socket takes
 * more. A connection knows its place in each, so that it can leave when its client does.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct buffer {
    char *data;
    size_t start, end, capacity;
};

struct conn {
    int fd;
    struct buffer in, out;
    /* The request being read. */
    bool head_done, chunked, close_after, is_post;
    char path[64];
    size_t body_start, body_length; /* where the body begins in `in` (from in.start), its decoded length */
    size_t chunk_at;                /* chunked: where the next chunk's size line begins */
    /* The stream being written; `left` content events are still to come. */
    bool streaming, waiting_to_write;
    long tokens, left, batch;
    uint64_t pace_ns, due_ns;
    long heap_index, hot_index; /* -1: not in that set */
};

struct set {
    struct conn **items;
    long count, capacity;
};

static struct set heap, hot;

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static char *reserve(struct buffer *b, size_t more) {
    if (b->start == b->end) b->start = b->end = 0;
    if (b->end + more > b->capacity) {
        if (b->start) {
            memmove(b->data, b->data + b->start, b->end - b->start);
            b->end -= b->start;
            b->start = 0;
        }
        if (b->end + more > b->capacity) {
            b->capacity = (b->end + more) * 2;
            if (!(b->data = realloc(b->data, b->capacity))) die("realloc");
        }
    }
    return b->data + b->end;
}

static void append(struct buffer *b, const char *data, size_t size) {
    memcpy(reserve(b, size), data, size);
    b->end += size;
}

static void set_append(struct set *s, struct conn *c) {
    if (s->count == s->capacity) {
        s->capacity = s->capacity ? s->capacity * 2 : 64;
        if (!(s->items = realloc(s->items, (size_t)s->capacity * sizeof *s->items))) die("realloc");
    }
    s->items[s->count++] = c;
}

static void hot_add(struct conn *c) {
    if (c->hot_index >= 0) return;
    c->hot_index = hot.count;
    set_append(&hot, c);
}

static void hot_remove(struct conn *c) {
    if (c->hot_index < 0) return;
    struct conn *last = hot.items[--hot.count];
    hot.items[c->hot_index] = last;
    last->hot_index = c->hot_index;
    c->hot_index = -1;
}

static void heap_put(long at, struct conn *c) {
    heap.items[at] = c;
    c->heap_index = at;
}

/* Move `c`, for which there is room at `at`, to where it belongs. */
static void heap_settle(long at, struct conn *c) {
    while (at > 0 && heap.items[(at - 1) / 2]->due_ns > c->due_ns) {
        heap_put(at, heap.items[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        long child = 2 * at + 1;
        if (child + 1 < heap.count && heap.items[child + 1]->due_ns < heap.items[child]->due_ns) child++;
        if (child >= heap.count || heap.items[child]->due_ns >= c->due_ns) break;
        heap_put(at, heap.items[child]);
        at = child;
    }
    heap_put(at, c);
}

static void heap_add(struct conn *c) {
    set_append(&heap, c);
    heap_settle(heap.count - 1, c);
}

static void heap_remove(struct conn *c) {
    if (c->heap_index < 0) return;
    struct conn *last = heap.items[--heap.count];
    if (last != c) heap_settle(c->heap_index, last);
    c->heap_index = -1;
}
