"""What each kind of table and folder gives: the cases, their outcomes, and docs/tables.md of them.

The page is written from the cases here: `python tests/test_tables.py --write` after a change.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
from PIL import Image

from wara.cards import load_card
from wara.data import ImageSet, assign_splits, check
from wara.data.sources import open_source
from wara.data.walk import is_image
from wara.errors import WaraError, WaraErrors

ABC = ["a.png", "b.png", "c.png"]


@dataclass(frozen=True)
class Table:
    """A table that some program writes, and what comes of it.

    Args:
        key: name of the case.
        writer: who writes such a table.
        text: the table; bytes for what is no UTF-8 text.
        gives: the outcome in words, see `outcome`.
        says: words that must stand in the notes, the refusal or the faults of rows.
        name: name of its file.
        images: files that are drawn beside it.
        card: body of a card; empty for none.
    """

    key: str
    writer: str
    text: str | bytes
    gives: str
    says: tuple[str, ...] = ()
    name: str = "labels.csv"
    images: tuple[str, ...] = tuple(ABC)
    card: str = ""


CHEST = "modality: chest_xray\naugment: chest_xray\n"
TWO = "classes: [{name: Edema, meaning: Oedema}, {name: Mass, meaning: A mass above 3 cm}]\n"
CARDS = {
    "nih": f"""\
title: NIH ChestX-ray14, as it is distributed
{CHEST}task: multilabel
{TWO}group_column: Patient ID
source:
  kind: csv
  path: Data_Entry_2017.csv
  file_column: Image Index
  folder: images_*/images
  label_column: Finding Labels
  none: [No Finding]
""",
    "chexpert": f"""\
title: CheXpert, as it is distributed
{CHEST}task: multilabel
classes: [{{name: Edema, meaning: Oedema}}, {{name: Pneumonia, meaning: Pneumonia}}]
source:
  kind: csv
  path: CheXpert-v1.0/train.csv
  file_column: Path
  folder: ..
  patient_pattern: (patient\\d+)
  uncertain: one
  blank: zero
""",
    "aptos": """\
title: APTOS 2019 of Kaggle, two of the five grades
modality: fundus
augment: fundus
task: ordinal
classes: [{name: no_dr, meaning: No retinopathy}, {name: mild, meaning: Microaneurysms only}]
source: {kind: csv, path: train.csv, file_column: id_code, folder: train_images,
         label_column: diagnosis}
""",
    "ham10000": """\
title: HAM10000, two of the seven lesions
modality: dermoscopy
augment: dermoscopy
task: binary
classes:
  - {name: nevus, meaning: Mole, aliases: [nv]}
  - {name: melanoma, meaning: Melanoma, aliases: [mel]}
group_column: lesion_id
source: {kind: csv, path: HAM10000_metadata.csv, file_column: image_id,
         folder: 'HAM10000_images_part_*', label_column: dx}
""",
    "redcap": """\
title: A REDCap project with a field of checkboxes
modality: ultrasound
augment: ultrasound
task: multilabel
classes:
  - {name: cyst, meaning: Cyst, aliases: [finding___1, Finding (choice=Cyst)]}
  - {name: mass, meaning: Solid mass, aliases: [finding___2, Finding (choice=Mass)]}
group_column: record_id
source: {kind: csv, path: labels.csv, file_column: image}
""",
    "headless": """\
title: A table without a header line, such as ISIC 2016
modality: dermoscopy
augment: dermoscopy
task: binary
classes: [{name: benign, meaning: Benign}, {name: malignant, meaning: Malignant}]
source: {kind: csv, path: labels.csv, columns: [image, answer], file_column: image,
         label_column: answer}
""",
    "padchest": f"""\
title: Lists of labels, such as PadChest
{CHEST}task: multilabel
{TWO}source: {{kind: csv, path: labels.csv, file_column: ImageID, label_column: Labels,
         none: [normal]}}
group_column: PatientID
""",
    "both": """\
title: Class columns that stay apart
modality: dermoscopy
augment: dermoscopy
task: multilabel
classes: [{name: MEL, meaning: m}, {name: NV, meaning: n}, {name: BCC, meaning: b}]
source: {kind: csv, path: labels.csv}
""",
}
ONE_HOT = "file,MEL,NV,BCC\na.png,1,0,0\nb.png,0,1,0\nc.png,0,0,1\n"
MULTICLASS = "multiclass (MEL, NV, BCC); 3 images; a.png is MEL"
TABLES = [
    Table("own", "you", "file,label,patient,split\na.png,x,p1,train\nb.png,y,p2,test\n",
          "binary (x, y); 2 images; a.png is x; patient p1; split train"),
    Table("any_case", "you", "File,Label\na.png,x\nb.png,y\n",
          "binary (x, y); 2 images; a.png is x"),
    Table("several", "you", "file,label\na.png,x|z\nb.png,\nc.png,y\n",
          "multilabel (x, y, z); 3 images; a.png is x, z"),
    Table("tsv", "any program", "file\tlabel\na.png\tx\nb.png\ty\n",
          "binary (x, y); 2 images; a.png is x", ("set apart by tabs",), name="mine.tsv"),
    # --- pandas and R
    Table("pandas_index", "pandas, `to_csv()` with its index",
          ",file,label\n0,a.png,x\n1,b.png,y\n", "binary (x, y); 2 images; a.png is x",
          ("without a name, so ignored: column 1",)),
    Table("pandas_twice", "pandas, written, read and written again",
          "Unnamed: 0.1,Unnamed: 0,file,MEL,NV\n0,0,a.png,1,0\n1,1,b.png,0,1\n",
          "binary (MEL, NV); 2 images; a.png is MEL"),
    Table("pandas_files_as_index", "pandas, file names as the index",
          ",label\na.png,x\nb.png,y\n", "binary (x, y); 2 images; a.png is x",
          ("column 'column 1' names the images",)),
    Table("pandas_float_labels", "pandas, whole numbers beside a missing one",
          "file,label\na.png,0.0\nb.png,1.0\nc.png,\n", "binary (0, 1); 2 images; a.png is 0",
          ("numbers such as 0.0", "labels.csv:4: c.png; write one class name", "no label")),
    Table("pandas_dummies", "pandas, `get_dummies`", "file,cat,dog\na.png,True,False\n"
          "b.png,False,True\n", "binary (cat, dog); 2 images; a.png is cat",
          ("exactly one of them is 1 in every row",)),
    Table("pandas_list", "pandas, lists in cells", "file,label\na.png,\"['x', 'y']\"\n"
          "b.png,['y']\n", "multilabel (x, y); 2 images; a.png is x, y",
          ("lists in column label are read as labels, in 2 rows",)),
    Table("pandas_nan", "pandas, `na_rep='nan'`; R (`NA`); Excel (`#N/A`)",
          "file,label\na.png,x\nb.png,y\nc.png,nan\n", "binary (x, y); 2 images; a.png is x",
          ("label 'nan' means that nothing is known; ", "labels.csv:4: c.png")),
    Table("r_row_names", "R, `write.csv`", '"","file","label"\n"1","a.png","x"\n'
          '"2","b.png","y"\n', "binary (x, y); 2 images; a.png is x"),
    Table("r_short_header", "R, `write.table(sep = ',')`",
          '"file","label"\n"1","a.png","x"\n"2","b.png","y"\n', "refused",
          ("row 2 has another number of columns than the header (2 rows in all)",
           "without row names")),
    Table("measured", "a score instead of a class", "file,label\na.png,0.25\nb.png,1\n",
          "refused", ("labels such as 0.25 are measured values",)),
    # --- spreadsheets
    Table("excel_mark", "Excel, 'CSV UTF-8'", b"\xef\xbb\xbffile,label\r\na.png,x\r\nb.png,y\r\n",
          "binary (x, y); 2 images; a.png is x"),
    Table("excel_semicolon", "Excel where the comma is the decimal sign",
          "file;MEL;NV\na.png;1,0;0,0\nb.png;0,0;1,0\n",
          "binary (MEL, NV); 2 images; a.png is MEL", ("set apart by ';'",)),
    Table("excel_sep", "Excel's own first line", "sep=;\nfile;label\na.png;x\nb.png;y\n",
          "binary (x, y); 2 images; a.png is x"),
    Table("excel_unicode", "Excel, 'Unicode Text'",
          "file\tlabel\r\na.png\tgutartig\r\nb.png\tbösartig\r\n".encode("utf-16"),
          "binary (bösartig, gutartig); 2 images; a.png is gutartig", ("the table is in UTF-16",),
          name="labels.txt"),
    Table("excel_ansi", "Excel, 'CSV' in the letters of the system",
          "file,label\na.png,gutartig\nb.png,bösartig\n".encode("cp1252"), "refused",
          ("line 3 holds letters of another encoding", "CSV UTF-8")),
    Table("utf16_unmarked", "UTF-16 without a mark",
          "file,label\na.png,x\nb.png,y\n".encode("utf-16-le"), "refused", ("UTF-16",)),
    Table("excel_tail", "Excel, columns that were emptied",
          "file,label,,\na.png,x,,\nb.png,y,,,\n", "binary (x, y); 2 images; a.png is x"),
    Table("workbook", "Excel, `.xlsx`", b"PK\x03\x04\x14\0\x06\0", "refused",
          ("an Excel workbook", "CSV UTF-8"), name="labels.xlsx"),
    Table("renamed_workbook", "Excel, `.xlsx` renamed", b"PK\x03\x04\x14\0\x06\0", "refused",
          ("an Excel workbook", "CSV UTF-8")),
    Table("old_workbook", "Excel, `.xls`", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "refused",
          ("an old Excel workbook", "CSV UTF-8"), name="labels.xls"),
    Table("parquet", "pandas, `to_parquet`", b"PAR1\x15\x04", "refused",
          ("a Parquet file", "to_csv(..., index=False)"), name="labels.parquet"),
    Table("zip", "Kaggle, as it is fetched", b"PK\x03\x04\x14\0\x06\0", "refused",
          ("a zip archive", "unpack it"), name="archive.zip"),
    Table("json", "pandas, `to_json`", '[{"file":"a.png","label":"x"}]', "refused",
          ("JSON, not a CSV table", "to_csv"), name="labels.json"),
    Table("web_page", "a download that asked for a login", "<!DOCTYPE html><html>", "refused",
          ("a web page", "fetch it again")),
    Table("two_separators", "cells with the other separator", "a;b,c\nx;y,z\n", "refused",
          ("may be set apart by ',' or by ';'", "with quotes")),
    # --- Kaggle and ISIC
    Table("isic_int", "ISIC 2018, 2019: one column per class", ONE_HOT, MULTICLASS,
          ("columns MEL, NV, BCC are one label per image",)),
    Table("isic_float", "ISIC 2018, as it is distributed",
          "image,MEL,NV,BCC\nISIC_1,1.0,0.0,0.0\nISIC_2,0.0,1.0,0.0\nISIC_3,0.0,0.0,1.0\n",
          "multiclass (MEL, NV, BCC); 3 images; ISIC_1.jpg is MEL",
          ("column 'image' names the images", "without ending in 3 rows"),
          images=("ISIC_1.jpg", "ISIC_2.jpg", "ISIC_3.jpg", "ISIC_3.txt")),
    Table("isic_multilabel", "the same with a card that says multilabel", ONE_HOT,
          "multilabel (MEL, NV, BCC); 3 images; a.png is MEL", card="both"),
    Table("isic_2017", "ISIC 2017: no 1 in some row",
          "image_id,melanoma,keratosis\na,1.0,0.0\nb,0.0,1.0\nc,0.0,0.0\n",
          "multilabel (melanoma, keratosis); 3 images; a.png is melanoma",
          ("none of them is 1 in 1 rows",)),
    Table("several_ones", "several 1s in some row", "file,x,y\na.png,1,1\nb.png,0,1\nc.png,1,0\n",
          "multilabel (x, y); 3 images; a.png is x, y", ("several of them are 1 in 1 rows",)),
    Table("isic_2016", "ISIC 2016: no header line", "a,benign\nb,malignant\n", "refused",
          ("the first line is a row", "put the line file,label on top")),
    Table("isic_2016_card", "the same with a card", "a,benign\nb,malignant\n",
          "binary (benign, malignant); 2 images; a.png is benign", card="headless"),
    Table("two_endings", "a name that two images have", "file,label\na,x\nb,y\n",
          "binary (x, y); 1 images; b.png is y", ("'a' may be a.jpg, a.png",),
          images=("a.png", "a.jpg", "b.png")),
    Table("aptos", "Kaggle, images in another folder", "id_code,diagnosis\n0a1,0\n9f3,1\n",
          "refused", ("no column 'file'", "source.file_column and source.folder"),
          name="train.csv", images=("train_images/0a1.png", "train_images/9f3.png")),
    Table("aptos_card", "the same with a card", "id_code,diagnosis\n0a1,0\n9f3,1\n",
          "ordinal (no_dr, mild); 2 images; train_images/0a1.png is no_dr", name="train.csv",
          images=("train_images/0a1.png", "train_images/9f3.png"), card="aptos"),
    Table("kaggle_label", "Kaggle, a label of another name", "filename,target\na.png,0\nb.png,1\n",
          "refused", ("no column 'label', and only 'target' could be a class",
                      "source.label_column")),
    Table("boxes", "Kaggle, one row per box",
          "patientId,x,y,label\na,264,152,1\na,562,152,1\nb,,,0\n",
          "binary (0, 1); 2 images; a.png is 1",
          ("listed in row 2 already", "column 'patientId' names the images")),
    Table("ham10000", "HAM10000, with a card",
          "lesion_id,image_id,dx,age\nHAM_1,a,nv,40.0\nHAM_2,b,mel,55.0\nHAM_1,c,nv,40.0\n",
          "binary (nevus, melanoma); 3 images; HAM10000_images_part_1/a.jpg is nevus; "
          "patient HAM_1", name="HAM10000_metadata.csv", card="ham10000",
          images=("HAM10000_images_part_1/a.jpg", "HAM10000_images_part_2/b.jpg",
                  "HAM10000_images_part_2/c.jpg")),
    Table("masks", "a column of images and one of masks",
          "image,mask,label\na.png,b.png,x\nb.png,a.png,y\n", "refused",
          ("columns image and mask both name files", "rename the column of the images to file")),
    Table("partly", "names that are not all there", "image,label\na.png,x\nb.png,y\nz.png,y\n",
          "refused", ("column 'image' names no file in 1 rows, first 'z.png'", "labels.csv:4")),
    # --- chest X-rays and REDCap
    Table("nih", "NIH ChestX-ray14, with a card",
          "Image Index,Finding Labels,Patient ID,OriginalImage[Width,Height],\n"
          "1_0.png,Edema|Mass,1,2048,2500,\n1_1.png,No Finding,1,2048,2500,\n",
          "multilabel (Edema, Mass); 2 images; images_001/images/1_0.png is Edema, Mass; "
          "patient 1", name="Data_Entry_2017.csv", card="nih",
          images=("images_001/images/1_0.png", "images_002/images/1_1.png")),
    Table("chexpert", "CheXpert, with a card",
          "Path,Sex,Edema,Pneumonia\nCheXpert-v1.0/train/patient1/study1/view1.jpg,F,1.0,-1.0\n"
          "CheXpert-v1.0/train/patient2/study1/view1.jpg,M,,0.0\n",
          "multilabel (Edema, Pneumonia); 2 images; train/patient1/study1/view1.jpg is Edema, "
          "Pneumonia; patient patient1",
          ("1 cells are empty and count as 0", "1 cells of -1 count as 1"),
          name="CheXpert-v1.0/train.csv", card="chexpert",
          images=("CheXpert-v1.0/train/patient1/study1/view1.jpg",
                  "CheXpert-v1.0/train/patient2/study1/view1.jpg")),
    Table("undeclared", "-1 and empty class columns that no card explains",
          "file,MEL,NV,BCC\na.png,1,0,0\nb.png,-1,0,1\nc.png,,0,0\n",
          "multilabel (MEL, NV, BCC); 1 images; a.png is MEL",
          ("holds '-1'; ", "uncertain: zero or one", "holds ''; ", "blank: zero"), card="both"),
    Table("padchest", "PadChest, with a card", "ImageID,PatientID,Labels\n"
          "a.png,1,\"['Edema', ' Mass']\"\nb.png,2,['normal']\n",
          "multilabel (Edema, Mass); 2 images; a.png is Edema, Mass; patient 1", card="padchest"),
    Table("redcap_raw", "REDCap, raw values, with a card",
          "record_id,image,finding___1,finding___2,form_complete\n1,a.png,1,0,2\n2,b.png,0,0,2\n",
          "multilabel (cyst, mass); 2 images; a.png is cyst; patient 1", card="redcap"),
    Table("redcap_labels", "REDCap, labels, with a card",
          "record_id,image,Finding (choice=Cyst),Finding (choice=Mass)\n"
          "1,a.png,Checked,Unchecked\n2,b.png,Unchecked,Checked\n",
          "multilabel (cyst, mass); 2 images; a.png is cyst; patient 1", card="redcap"),
    Table("redcap_alone", "REDCap without a card", "record_id,image,finding___1,form_complete\n"
          "1,a.png,1,2\n1,b.png,0,2\n", "refused",
          ("column 'record_id' seems to name patients", "group_column")),
    # --- words and patients
    Table("nobody", "patients that nobody knows", "file,label,patient\na.png,x,unknown\n"
          "b.png,y,unknown\nc.png,y,\n", "binary (x, y); 3 images; a.png is x",
          ("3 rows name no patient (2 'unknown', 1 empty); each counts as one of its own",)),
    Table("patient_id", "patients under another name", "file,label,patient_id\na.png,x,1\n"
          "b.png,y,1\n", "refused",
          ("'patient_id' seems to name patients", "rename it to patient")),
    Table("capitals", "one class in two spellings", "file,label\na.png,Benign\nb.png,benign\n",
          "refused", ("'Benign' and 'benign' differ in capitals or spaces only",)),
    Table("patient_spellings", "patients in two spellings",
          "file,label,patient\na.png,x,007\nb.png,y,8\nc.png,y,7.0\n",
          "binary (x, y); 2 images; a.png is x; patient 007",
          ("patient '7.0' is '007' of row 2 in another spelling; ", "labels.csv:4: c.png")),
    Table("split_words", "other words for the splits",
          "file,label,split\na.png,x,Training\nb.png,y,valid\nc.png,y,holdout\n",
          "binary (x, y); 2 images; a.png is x; split train",
          ("words for splits: 'Training' is train (1 rows), 'valid' is val (1 rows)",
           "split 'holdout'; ", "write train, val or test")),
    Table("formulas", "a spreadsheet, formulas in the place of values",
          "file,label\na.png,x\nb.png,y\nc.png,\"=IF(B2=\"\"x\"\",1,0)\"\n", "refused",
          ("label '=IF(B2=\"x\",1,0)' is a formula", "with values")),
    # --- other places
    Table("outside", "names and links that leave the folder",
          "file,label\na.png,x\nb.png,y\n../c.png,x\n/etc/hostname,y\nd.png,x\n",
          "binary (x, y); 2 images; a.png is x",
          ("'../c.png' leads out of ", "'/etc/hostname' leads out of ", "'d.png' leads out of ",
           "data.root"), images=("a.png", "b.png", "d.png -> ../d.png")),
    Table("no_files", "names of a folder, a pipe and a link to nothing",
          "file,label\na.png,x\nb.png,y\nsub,x\nc.png,y\nd.png,x\n",
          "binary (x, y); 2 images; a.png is x",
          ("'sub' is no file", "'c.png' is no file", "'d.png' is no file"),
          images=("a.png", "b.png", "c.png|", "d.png -> gone.png", "sub/x.png")),
    Table("unicode_forms", "macOS, names in decomposed letters",
          "file,label\nbo\u0308se.png,x\ngut.png,y\nb\u00f6se.png,x\n",
          "binary (x, y); 2 images; bo\u0308se.png is x", ("listed in row 2 already",),
          images=("b\u00f6se.png", "gut.png")),
    Table("other_mark", "several labels with another mark",
          "file,label\na.png,x;y\nb.png,x\nc.png,y\n", "refused",
          ("label 'x;y' seems to be several labels", "a|b", "source.label_separator")),
    Table("windows_paths", "Windows paths", "file,label\nsub\\a.png,x\nsub\\b.png,y\n",
          "binary (x, y); 2 images; sub/a.png is x", ("'\\' is read as '/'",),
          images=("sub/a.png", "sub/b.png")),
]  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """A folder that some machine leaves, and what comes of it; fields as in `Table`.

    A path that ends in `/` is an empty folder, one with ` -> ` a link, one that ends in `|` a pipe.
    """

    key: str
    writer: str
    paths: tuple[str, ...]
    gives: str
    says: tuple[str, ...] = ()
    silent: bool = field(default=False)


GOOD = ("benign/a.png", "malignant/b.png")
TWO_IMAGES = "binary (benign, malignant); 2 images; benign/a.png is benign"
TREES = [
    Tree("plain", "you", GOOD, TWO_IMAGES, silent=True),
    Tree("split", "you", ("train/x/a.png", "train/y/b.png", "val/x/c.png", "test/y/d.png"),
         "binary (x, y); 4 images; test/y/d.png is y; split test", silent=True),
    Tree("dicom_uid", "a scanner or an archive: no endings",
         ("a/1.2.826.0.1.3680043.8.498.1", "a/IM0001", "b/1.2.826.0.1.3680043.8.498.2", "b/I2"),
         "binary (a, b); 4 images; a/1.2.826.0.1.3680043.8.498.1 is a", silent=True),
    Tree("other_ending", "images of another ending", ("a/x.img", "b/y.png.part"),
         "binary (a, b); 2 images; a/x.img is a", silent=True),
    Tree("macos", "macOS, and its zip files",
         (*GOOD, "__MACOSX/benign/._a.png", ".DS_Store", "benign/.DS_Store", "benign/._a.png",
          "malignant/.AppleDouble/b.png", ".Spotlight-V100/x", ".Trashes/c.png"),
         TWO_IMAGES, ("2 of macOS (.DS_Store)", "1 of macOS (__MACOSX)", "1 of macOS (._*)")),
    Tree("windows", "Windows",
         (*GOOD, "Thumbs.db", "benign/thumbs.db", "desktop.ini", "benign/~$a.png",
          "$RECYCLE.BIN/S-1/c.png", "System Volume Information/x"),
         TWO_IMAGES, ("2 of Windows (Thumbs.db)", "1 of Windows ($RECYCLE.BIN)")),
    Tree("synology", "a Synology NAS",
         (*GOOD, "benign/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x.jpg", "#recycle/c.png",
          "@tmp/d.png"), TWO_IMAGES, ("2 of Synology (@eaDir)", "1 of Synology (#recycle)")),
    Tree("qnap", "a QNAP NAS", (*GOOD, "benign/.@__thumb/s100a.png", "@Recycle/c.png"),
         TWO_IMAGES, ("1 of QNAP (.@__thumb)", "1 of QNAP (@Recycle)")),
    Tree("pacs", "a PACS export",
         ("DICOMDIR", "LOCKFILE", "VERSION", "autorun.inf", "a/IM1", "a/DICOMDIR", "b/IM1",
          "b/IM2/VIEWER/logo.png", "b/IM2/VIEWER/jre/x.dll"), "binary (a, b); 2 images; a/IM1 is a",
         ("2 of a PACS export (DICOMDIR)", "2 of the viewer of a PACS export")),
    Tree("jupyter", "Jupyter and Python",
         (*GOOD, "benign/.ipynb_checkpoints/a-checkpoint.png", ".ipynb_checkpoints/x.png"),
         TWO_IMAGES, ("2 of Jupyter and Python (.ipynb_checkpoints)",)),
    Tree("git", "version control", (*GOOD, ".git/objects/x", "benign/.gitkeep"), TWO_IMAGES,
         ("1 of version control (.git)", "1 of version control (.gitkeep)")),
    Tree("backups", "editors, and hidden files", (*GOOD, "benign/a.png~", "benign/.old.png"),
         TWO_IMAGES, ("1 of an editor (*~)", "1 hidden")),
    Tree("others", "you: other files", (*GOOD, "benign/report.txt", "README.md", "c.png"),
         TWO_IMAGES, ("1 images beside the class folders", "1 .md, 1 .txt")),
    Tree("no_image", "text that is called an image", (*GOOD, "benign/text.png"),
         "binary (benign, malignant); 3 images; benign/a.png is benign",
         ("not a readable PNG, JPEG, TIFF or DICOM", "text.png")),
    Tree("other_format", "images that are not read", (*GOOD, "benign/c.bmp", "benign/d.nii.gz"),
         "binary (benign, malignant); 4 images; benign/a.png is benign",
         ("not a readable PNG, JPEG, TIFF or DICOM", "c.bmp", "d.nii.gz")),
    Tree("linked_class", "a class folder that is a link", ("a -> .a", ".a/a.png", "b/b.png"),
         "binary (a, b); 2 images; a/a.png is a", ("1 hidden",)),
    Tree("linked_outside", "links that leave the folder", ("store/a/a.png", "store/d.png",
         "set/a -> ../store/a", "set/b/b.png", "set/c/c.png", "set/c/d.png -> ../../store/d.png"),
         "binary (b, c); 2 images; b/b.png is b",
         ("'a' leads out of ", "'d.png' leads out of ", "data.root")),
    Tree("linked_round", "links that lead back", (*GOOD, "all -> .", "twice -> benign"),
         "multiclass (benign, malignant, twice); 3 images; benign/a.png is benign",
         ("a link to a folder that it lies in; all; ",
          "a link to images of benign, a class folder already; twice; ")),
    Tree("linked", "a linked folder in a class", (*GOOD, "benign/more -> ../malignant"),
         TWO_IMAGES, ("a link to a folder; ", "benign/more; put the folder itself there")),
    Tree("dangling", "a link to nothing", (*GOOD, "benign/c.png -> gone.png"), TWO_IMAGES,
         ("a link to nothing; ", "benign/c.png; mend it or remove it")),
    Tree("pipe", "a pipe", (*GOOD, "benign/c.png|"), TWO_IMAGES,
         ("neither a file nor a folder; ", "benign/c.png")),
    Tree("one_class", "one class, and litter", ("benign/a.png", "@eaDir/x.jpg"), "refused",
         ("only the class 'benign'", "left out: 1 of Synology (@eaDir)")),
    Tree("nan", "a script that sorts by a missing label", (*GOOD, "nan/c.png"), "refused",
         ("class 'nan' means that nothing is known", "rename the folder")),
    Tree("spellings", "one class in two spellings", (*GOOD, "Benign/c.png"), "refused",
         ("differ in capitals or spaces only",)),
    Tree("kaggle_folder", "a table of another name beside its images",
         ("train.csv", "images/a.png"), "refused",
         ("neither labels.csv nor folders of two classes", "give it as the data set", "train.csv")),
    Tree("workbook_folder", "a workbook beside its images", ("labels.xlsx", *GOOD), "refused",
         ("an Excel workbook", "CSV UTF-8")),
]  # fmt: skip


# --- drawing them -----------------------------------------------------------------------------


def picture(value: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (20, 16), value % 256).save(stream, form)
    return stream.getvalue()


def dicom(value: int, *, preamble: bool = True) -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = Dataset()
    image.file_meta = meta
    image.SOPClassUID, image.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
    image.Rows, image.Columns, image.SamplesPerPixel = 16, 20, 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    image.PixelData = np.full((16, 20), value, np.uint8).tobytes()
    stream = io.BytesIO()
    image.save_as(stream, enforce_file_format=preamble, implicit_vr=False, little_endian=True)
    return stream.getvalue()


def content(path: str, value: int) -> bytes:
    """What a file of that name holds in these cases."""
    name = path.rpartition("/")[2]
    if name == "DICOMDIR":
        return b"\0" * 128 + b"DICM" + b"\2\0\2\0UI\x14\x001.2.840.10008.1.3.10\0"
    if name == "labels.xlsx":
        return b"PK\x03\x04\x14\0\x06\0"
    if re.fullmatch(r"I(M)?\d+|[\d.]+", name):
        return dicom(value)
    if name.endswith((".jpg", ".jpeg")):
        return picture(value, "JPEG")
    if name.startswith(("._", "text")) or name.endswith((".txt", ".csv", ".md", ".dll", ".nii.gz")):
        return b"no image"
    if name.endswith(".bmp"):
        return picture(value, "BMP")
    if name.lower().endswith(("png", "~", ".img", ".part")):
        return picture(value)
    return b"\0\1\2 something"


def draw(folder: Path, paths: tuple[str, ...]) -> None:
    for value, path in enumerate(paths):
        name, _, target = path.partition(" -> ")
        whole = folder / name.removesuffix("|")
        whole.parent.mkdir(parents=True, exist_ok=True)
        if target:
            whole.symlink_to(target)
        elif name.endswith("|"):
            os.mkfifo(whole)
        else:
            whole.write_bytes(content(path, 10 * value + 10))


def make_table(case: Table, folder: Path) -> Path:
    """Draw a case; return what `dataset` would name."""
    draw(folder, case.images)
    path = folder / case.name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = case.text if isinstance(case.text, bytes) else case.text.encode()
    path.write_bytes(data)
    if not case.card:
        return path
    card = folder / f"{case.card}.yaml"
    card.write_text(f"name: {case.card}\n{CARDS[case.card]}")
    return card


def make_tree(case: Tree, folder: Path) -> Path:
    draw(folder, case.paths)
    return folder / "set" if (folder / "set").exists() else folder


# --- what comes of them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the data room makes of a case, without the path of its folder."""

    gives: str
    notes: list[str]
    faults: list[str]


def outcome(dataset: Path, folder: Path, **options: Any) -> Outcome:
    """Open a data set: `binary (x, y); 2 images; a.png is x; patient p1`, or `refused`."""

    def clean(text: object) -> str:
        plain = str(text).replace(f"{folder}/", "").replace(str(folder), "the folder")
        return plain.removeprefix("error[data]: ")

    try:
        images = open_source(
            str(dataset), cache=folder / "cache", offline="error", seed=0, **options
        )
    except WaraErrors as error:
        assert error.exit_code == 3
        return Outcome("refused", [], [clean(each) for each in error.errors])
    except WaraError as error:
        assert error.exit_code == 3 and error.remedy
        return Outcome("refused", [], [clean(error)])
    faults = [clean(fault) for fault in (*images.faults, *images.survey())]
    return Outcome(described(images), [clean(note) for note in images.notes], faults)


def described(images: ImageSet) -> str:
    first = images.records[0]
    names = images.card.class_names
    label = first.label if isinstance(first.label, tuple) else None
    shown = (
        ", ".join(name for name, bit in zip(names, label, strict=True) if bit)
        if label is not None
        else names[first.label]
    )
    words = [
        f"{images.card.task} ({', '.join(names)})",
        f"{len(images)} images",
        f"{first.file} is {shown or 'none of them'}",
    ]
    words += [f"patient {first.patient}"] if first.patient else []
    words += [f"split {first.split}"] if first.split else []
    return "; ".join(words)


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.key)
def test_what_a_table_gives(case: Table, tmp_path: Path) -> None:
    found = outcome(make_table(case, tmp_path), tmp_path)
    text = "\n".join([*found.notes, *found.faults])
    assert found.gives == case.gives, text
    for words in case.says:
        assert words in text
    assert len(found.faults) < 2 or found.gives != "refused"


@pytest.mark.parametrize("case", TREES, ids=lambda case: case.key)
def test_what_a_folder_gives(case: Tree, tmp_path: Path) -> None:
    found = outcome(make_tree(case, tmp_path), tmp_path)
    text = "\n".join([*found.notes, *found.faults])
    assert found.gives == case.gives, text
    for words in case.says:
        assert words in text
    if case.silent:
        assert not found.faults and "left out" not in text


# --- more than one line of the page -----------------------------------------------------------


def test_every_case_has_its_name() -> None:
    keys = [case.key for case in (*TABLES, *TREES)]
    assert len(set(keys)) == len(keys)
    assert {case.card for case in TABLES} - {""} == set(CARDS)


@pytest.mark.parametrize("card", sorted(CARDS))
def test_cards_of_the_page_are_sound(card: str, tmp_path: Path) -> None:
    (tmp_path / f"{card}.yaml").write_text(f"name: {card}\n{CARDS[card]}")
    assert load_card(tmp_path / f"{card}.yaml").name == card


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_thumbnails_of_a_network_drive_are_no_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("benign", "malignant"):
        for index in range(10):
            image = Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8))
            stream, small = io.BytesIO(), io.BytesIO()
            image.save(stream, "PNG")
            image.resize((10, 10)).save(small, "JPEG")
            put(tmp_path / name / f"{index}.png", stream.getvalue())
            put(tmp_path / name / f"@eaDir/{index}.png/SYNOPHOTO_THUMB_M.jpg", small.getvalue())
    images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
    assert len(images) == 20 and "left out: 20 of Synology (@eaDir)" in images.notes
    splits = assign_splits(images, val_fraction=0.2, test_fraction=0.2, seed=0)
    assert "left out: 20 of Synology (@eaDir)" in check(images, splits, report_dir=None)
    # A refusal shows no notes, so it says at its end what was left out.
    put(tmp_path / "benign/bad.png", b"text")
    images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
    splits = assign_splits(images, val_fraction=0.2, test_fraction=0.2, seed=0)
    with pytest.raises(WaraErrors) as caught:
        check(images, splits, report_dir=None)
    first, last = str(caught.value).splitlines()
    assert "bad.png" in first and "left out: 20 of Synology (@eaDir)" in last


def test_the_ground_truth_of_isic_2018_is_read_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "cache/isic2018"
    names = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    draw(root, tuple(f"ISIC_{index}.jpg" for index in range(7)))
    rows = "".join(
        f"ISIC_{index},{','.join(str(float(index == place)) for place in range(7))}\n"
        for index in range(7)
    )
    put(root / "labels.csv", f"image,{','.join(names)}\n{rows}".encode())
    images = open_source("isic2018", cache=tmp_path / "cache", offline="error", seed=0)
    assert images.card.name == "isic2018" and images.card.task == "multiclass"
    assert [record.label for record in images.records] == list(range(7)) and not images.faults


@pytest.mark.parametrize("preamble", [True, False])
def test_dicom_is_known_by_content(preamble: bool, tmp_path: Path) -> None:
    assert is_image(put(tmp_path / "x", dicom(5, preamble=preamble)))
    assert not is_image(put(tmp_path / "y", b"\x08\x00" + b"text " * 50))
    assert not is_image(put(tmp_path / "z", b""))


def test_dicom_in_the_folder_of_a_viewer_is_an_image(tmp_path: Path) -> None:
    draw(tmp_path, ("a/VIEWER/IM1", "a/VIEWER/icon.png", "b/IM1"))
    images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
    assert [record.file for record in images.records] == ["a/VIEWER/IM1", "b/IM1"]


def test_what_cannot_be_looked_into_is_a_fault(tmp_path: Path) -> None:
    draw(tmp_path, (*GOOD, "benign/closed/c.png"))
    (tmp_path / "benign/loop").symlink_to("loop")
    put(tmp_path / "benign/.c.png.icloud", b"bplist00")
    closed = tmp_path / "benign/closed"
    closed.chmod(0)
    try:
        images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
        may_read = os.access(closed, os.R_OK)
    finally:
        closed.chmod(0o700)
    text = "\n".join(map(str, images.faults))
    assert f"a link to nothing; {tmp_path}/benign/loop" in text
    assert "iCloud keeps elsewhere" in text
    assert may_read or f"cannot look into the folder: Permission denied; {closed}" in text


@pytest.mark.parametrize("card", [None, "modality: null\n", "modality: null\naugment: 'off'\n"])
@pytest.mark.parametrize("modality", [None, "dermoscopy"])
def test_the_modality_of_the_config_holds_unless_a_card_says_otherwise(
    card: str | None, modality: str | None, tmp_path: Path
) -> None:
    draw(tmp_path, GOOD)
    wanted = modality or "general"
    options: dict[str, Any] = {"cache": None, "offline": "error", "seed": 0, "modality": modality}
    if card is None:
        put(tmp_path / "set.csv", b"file,label\nbenign/a.png,b\nmalignant/b.png,m\n")
        for dataset in (tmp_path, tmp_path / "set.csv"):
            images = open_source(str(dataset), **options)
            assert images.card.modality == modality and images.card.augment == wanted
            assert any("modality not known" in note for note in images.notes) == (modality is None)
            assert any(note.startswith("no card: ") for note in images.notes)
        return
    body = "title: x\ntask: binary\nclasses: [{name: benign, meaning: b}, {name: malignant, "
    body += f"meaning: m}}]\nsource: {{kind: folder, path: .}}\n{card}"
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{body}")
    found = open_source(str(tmp_path / "mine.yaml"), **options).card
    assert found.modality == modality and found.augment == ("off" if "off" in card else wanted)
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{body.replace('null', 'fundus')}")
    found = open_source(str(tmp_path / "mine.yaml"), **options).card
    assert found.modality == "fundus" and found.augment == ("off" if "off" in card else "general")


NOTHING = ["NA", "nan", "None", "null", "-1", "-1.0", "?", "N/A", "#N/A", "<NA>"]


@pytest.mark.parametrize("word", NOTHING)
def test_words_that_mean_nothing(word: str, tmp_path: Path) -> None:
    rows = f"file,label,patient\na.png,x,p\nb.png,y,{word}\nc.png,{word},{word}\n"
    put(tmp_path / "labels.csv", rows.encode())
    images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
    assert images.card.class_names == ["x", "y"]
    (fault,) = images.faults
    assert f"label '{word}' means" in fault.what and "labels.csv:4" in fault.where
    assert [record.patient for record in images.records] == ["p", None]
    # A card may say that the word is a class.
    card = "name: mine\ntitle: x\ntask: binary\nclasses: [{name: x, meaning: x, aliases: [y]}, "
    card += f"{{name: none, meaning: y, aliases: ['{word}']}}]\nsource: {{kind: folder, path: .}}\n"
    (tmp_path / "mine.yaml").write_text(card)
    images = open_source(str(tmp_path / "mine.yaml"), cache=None, offline="error", seed=0)
    assert not images.faults and images.records[2].label == 1


STRANGERS = ["unknown", "Unknown", "NA", "n/a", "nan", "None", "null", "-", "?", "", "anonymous"]


@pytest.mark.parametrize("word", STRANGERS)
def test_strangers_are_not_one_patient(word: str, tmp_path: Path) -> None:
    rows = "".join(f"{index}.png,{'xy'[index % 2]},{word}\n" for index in range(40))
    put(tmp_path / "labels.csv", f"file,label,patient\n{rows}".encode())
    rng = np.random.default_rng(0)
    for index in range(40):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(stream, "PNG")
        put(tmp_path / f"{index}.png", stream.getvalue())
    images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
    splits = assign_splits(images, val_fraction=0.2, test_fraction=0.2, seed=0)
    assert sorted(splits) == ["test"] * 8 + ["train"] * 24 + ["val"] * 8
    (note,) = [note for note in check(images, splits, report_dir=None) if "name no patient" in note]
    assert note.startswith(f"40 rows name no patient (40 {repr(word) if word else 'empty'})")


def test_patients_by_a_pattern_that_name_nobody(tmp_path: Path) -> None:
    draw(tmp_path, ("a/unknown_1.png", "a/p7_1.png", "b/unknown_2.png", "b/9.png"))
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: x\ntask: binary\nclasses: [{name: a, meaning: a}, {name: b, meaning: b}"
        "]\nsource: {kind: folder, path: ., patient_pattern: '([a-z0-9]+)_'}\n"
    )
    images = open_source(str(tmp_path / "mine.yaml"), cache=None, offline="error", seed=0)
    assert [record.patient for record in images.records] == ["p7", None, None, None]
    assert any("1 of 4 file names show no patient" in note for note in images.notes)
    assert any("2 file names name no patient (2 'unknown')" in note for note in images.notes)


def test_rows_are_named_by_the_line_they_stand_on(tmp_path: Path) -> None:
    put(tmp_path / "labels.csv", b'file,label,remark\na.png,x,"two\nlines"\n\nb.png,NA,\n')
    put(tmp_path / "more.csv", b"sep=;\nfile;label\na.png;x\na.png;y\n")
    with pytest.raises(WaraError, match="only the class 'x'"):
        open_source(str(tmp_path), cache=None, offline="error", seed=0)
    put(tmp_path / "labels.csv", b'file,label,remark\na.png,x,"two\nlines"\n\nb.png,NA,\nc,y,\n')
    (fault,) = open_source(str(tmp_path), cache=None, offline="error", seed=0).faults
    assert "labels.csv:5: b.png" in fault.where
    (fault,) = open_source(str(tmp_path / "more.csv"), cache=None, offline="error", seed=0).faults
    assert "more.csv:4" in fault.where and "row 3" in fault.what


def test_a_pipe_in_a_table_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    draw(tmp_path, ("a.png", "b.png", "c.png|"))
    put(tmp_path / "labels.csv", b"file,label\na.png,x\nb.png,y\nc.png,x\n")
    (fault,) = open_source(str(tmp_path), cache=None, offline="error", seed=0).faults
    assert "'c.png' is no file" in fault.what and "labels.csv:4" in fault.where


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("columns: [a]", "at least 2"),
        ("columns: [a, a]", "one column twice"),
        ("columns: [a, b], label_column: c", "label_column 'c' is not among columns"),
        ("label_column: c, uncertain: one", "uncertain and blank are for class columns"),
        ("label_column: c, none: [x]", "'x' means none and names a class"),
        ("uncertain: maybe", "should be one of zero, one"),
        ("patient_pattern: a", "0 groups"),
        ("lable_column: a", "did you mean 'label_column'?"),
    ],
)
def test_faulty_sources_are_refused(body: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: x\ntask: multilabel\nclasses: [{name: x, meaning: x}, {name: y, "
        f"meaning: y}}]\nsource: {{kind: csv, {body}}}\n"
    )
    with pytest.raises(WaraError) as caught:
        load_card(tmp_path / "mine.yaml")
    assert words in str(caught.value) and "mine.yaml" in str(caught.value)


# --- the page ---------------------------------------------------------------------------------


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{cell(text)}{fence}" if text else ""


def shown(found: Outcome, *, card: str = "") -> str:
    notes = [note for note in found.notes if not note.startswith("no card: ")]
    lines = [f"{found.gives}" if found.gives != "refused" else "**refused**"]
    lines[0] += f" (card `{card}`)" if card else ""
    lines += notes + [f"*{fault}*" for fault in found.faults]
    return "<br>".join(cell(line).replace("<", "&lt;").replace("&lt;br>", "<br>") for line in lines)


def rows_of(text: str | bytes) -> str:
    if isinstance(text, bytes):
        for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16")):
            if text.startswith(mark):
                text = text.decode(encoding)
                break
        else:
            text = text.decode("cp1252") if text[-1:] == b"\n" and b"\0" not in text else ""
    lines = text.replace("\r", "").replace("\t", " ⇥ ").splitlines()
    return "<br>".join(code(line) for line in lines) or "(bytes)"


def render(kind: str) -> str:
    """Return a section of the page: a row per case, made by opening it."""
    lines = ["| written by | it holds | what comes of it |", "|---|---|---|"]
    for case in TABLES if kind == "tables" else TREES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            if isinstance(case, Table):
                found = outcome(make_table(case, folder), folder)
                holds = rows_of(case.text)
                card = case.card
            else:
                found = outcome(make_tree(case, folder), folder)
                holds = ", ".join(code(path) for path in case.paths)
                card = ""
        lines.append(f"| {case.writer} | {holds} | {shown(found, card=card)} |")
    if kind == "tables":
        lines += ["", "The cards named there:", ""]
        for name, body in CARDS.items():
            lines += ["```yaml", f"name: {name}", body.rstrip(), "```", ""]
    return "\n".join(lines).rstrip()


def made() -> tuple[str, str, dict[str, str]]:
    parts = {kind: render(kind) for kind in ("tables", "folders")}
    return "tables.md", Path(__file__).name, parts


def test_the_page_shows_what_the_cases_give() -> None:
    pages.check(*made())


if __name__ == "__main__" and "--write" in sys.argv:
    pages.write(*made())


def test_what_a_table_says_beyond_the_label_is_kept_for_each_record(tmp_path: Path) -> None:
    for value, name in enumerate("abc"):
        put(tmp_path / f"{name}.png", picture(value))
    table = tmp_path / "t.csv"
    table.write_text("file,label,age\na.png,x,40\nb.png,,50\nc.png,y,60\n")
    images = open_source(str(table), cache=None, offline="error", seed=0)
    assert len(images.faults) == 1  # the row without a label is no record
    assert images.columns["age"] == ["40", "60"] and images.columns["label"] == ["x", "y"]
