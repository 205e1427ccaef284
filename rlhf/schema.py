"""The tables of the label store."""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 2

tables = sa.MetaData()

meta = sa.Table(
    "meta",
    tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
items = sa.Table(
    "items",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text, unique=True, nullable=False, comment="fingerprint of prompt, completions and round"),
    sa.Column("prompt_key", sa.Text, index=True, nullable=False),
    sa.Column("prompt", sa.JSON, nullable=False),
    sa.Column("round", sa.Integer, index=True, nullable=False),
)
completions = sa.Table(
    "completions",
    tables,
    sa.Column("item_id", sa.ForeignKey("items.id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("finished", sa.Boolean, nullable=False),
)
gold = sa.Table(
    "gold",
    tables,
    sa.Column("item_id", sa.ForeignKey("items.id"), primary_key=True),
    sa.Column("ranks", sa.JSON, nullable=False, comment="the known answer, of the completions as stored"),
    sa.Column("explanation", sa.Text),
)
guidelines = sa.Table(
    "guidelines",
    tables,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("quiz", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
)
users = sa.Table(
    "users",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, unique=True, nullable=False),
    sa.Column("password_hash", sa.Text, comment="null: cannot log in"),
    sa.Column("role", sa.Text, nullable=False, comment="annotator or admin"),
    sa.Column("paused", sa.Boolean, nullable=False, default=False),
    sa.Column("failures", sa.Integer, nullable=False, default=0, comment="wrong passwords since the last right one"),
    sa.Column("locked_until", sa.Float, nullable=False, default=0.0, comment="unix time"),
    sa.Column("created_at", sa.Text, nullable=False),
)
invites = sa.Table(
    "invites",
    tables,
    sa.Column("token_hash", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, comment="for whom; null: the guest chooses"),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("used_by", sa.Text),
)
sessions = sa.Table(
    "sessions",
    tables,
    sa.Column("token_hash", sa.Text, primary_key=True),
    sa.Column("user_id", sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("csrf", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
)
quiz_results = sa.Table(
    "quiz_results",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("annotator", sa.Text, nullable=False, index=True),
    sa.Column("guideline_version", sa.Integer, nullable=False),
    sa.Column("answers", sa.JSON, nullable=False),
    sa.Column("passed", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
)
assignments = sa.Table(
    "assignments",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("item_id", sa.ForeignKey("items.id"), nullable=False),
    sa.Column("annotator", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, default="task", comment="task, gold, repeat or adjudication"),
    sa.Column("presented_order", sa.JSON, nullable=False, comment="indices of completions as shown"),
    sa.Column("state", sa.Text, nullable=False, comment="open, done, late or skipped"),
    sa.Column("leased_until", sa.Float, nullable=False, comment="unix time until which an open one holds its place"),
    sa.Column("shown_at", sa.Float, comment="unix time of the last hand-out"),
    sa.Column("event", sa.Integer, nullable=False, comment="the last event that touched it"),
    sa.UniqueConstraint("item_id", "annotator", "kind"),
    sa.Index("assignments_by_annotator", "annotator", "state"),
    sa.Index("assignments_by_item", "item_id", "kind", "state", "leased_until"),
)
drafts = sa.Table(
    "drafts",
    tables,
    sa.Column("assignment_id", sa.ForeignKey("assignments.id"), primary_key=True),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("saved_at", sa.Text, nullable=False),
)
rankings = sa.Table(
    "rankings",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("assignment_id", sa.ForeignKey("assignments.id"), nullable=False),
    sa.Column("idempotency_key", sa.Text, unique=True, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("active", sa.Boolean, nullable=False, comment="false once superseded or undone"),
    sa.Column("ranks", sa.JSON, nullable=False, comment="of the completions as stored; null is set aside"),
    sa.Column("presented_order", sa.JSON(none_as_null=True), comment="indices of completions as shown"),
    sa.Column("flags", sa.JSON, nullable=False, comment="what the annotator said about the item"),
    sa.Column("marks", sa.JSON, nullable=False, default=list, comment="what the server noticed: late, too_fast"),
    sa.Column("rationale", sa.Text),
    sa.Column("seconds", sa.Float),
    sa.Column("guideline_version", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("event", sa.Integer, nullable=False, comment="the event that holds the same words"),
    sa.UniqueConstraint("assignment_id", "version"),
)
sa.Index(
    "one_active_ranking",
    rankings.c.assignment_id,
    unique=True,
    sqlite_where=rankings.c.active,
    postgresql_where=rankings.c.active,
)
events = sa.Table(
    "events",
    tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False, comment="1, 2, 3 ... without a gap"),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("item_id", sa.Integer),
    sa.Column("payload_hash", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False, comment="hash of the event before"),
    sa.Column("hash", sa.Text, nullable=False),
)
payloads = sa.Table(
    "payloads",
    tables,
    sa.Column("event_id", sa.ForeignKey("events.id"), primary_key=True),
    sa.Column("annotator", sa.Text, index=True),
    sa.Column("salt", sa.Text, nullable=False, comment="without it nobody can try out what an erased body said"),
    sa.Column("body", sa.Text, comment="canonical JSON; null once erased"),
)
