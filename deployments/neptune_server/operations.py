"""What the API can do, operation by operation; the client has only the methods that are named here.

Three lines each: how it is called and the client's name for it; parameters and answer; what it does. Of the
parameters, `#name` is a whole number, `*name` a list, `@name` a header, `{name}` a JSON object and `[name]` a JSON
list as the body, all others are texts in the URL. `-> [X]` is a list of X, `-> -` is no JSON. `{type}` stands for
each of `READABLE`.
"""

from __future__ import annotations

READABLE = (
    "float",
    "int",
    "bool",
    "string",
    "stringSet",
    "datetime",
    "file",
    "floatSeries",
    "stringSeries",
    "artifact",
)

OPERATIONS = """
backend:
get /clients/config getClientConfig
    @X-Neptune-Api-Token alpha -> ClientConfig
    server address, limits of uploads
get /authorization/oauth-token exchangeApiToken
    @X-Neptune-Api-Token -> SessionTokens
    session tokens for the API token
get /projects/get getProject
    projectIdentifier -> Project
    one project
get /projects/list listProjects
    #limit organizationIdentifier searchTerm userRelation *sortBy *sortDirection -> Projects
    projects, of one workspace or of all
post /projects createProject
    {projectToCreate} -> Project
    make a project
get /organizations listOrganizations
     -> [Workspace]
    workspaces
leaderboard:
post /experiments createExperiment
    {experimentCreationParams} @X-Neptune-CliVersion -> Container
    make a model or a model version
get /experiments getExperiment
    experimentId -> Container
    one project, model or version
post /experiments/trash trashExperiments
    projectIdentifier [experimentIdentifiers] -> Changed
    move models or versions to the trash
post /experiments/delete deleteExperiments
    projectIdentifier [experimentIdentifiers] -> Changed
    delete what is in the trash
post /experiments/clear deleteAllExperiments
    projectIdentifier -> Changed
    empty a project's trash
post /experiments/ping ping
    experimentId -> -
    note that a client is alive
post /attributes/operations executeOperations
    experimentId [operations] -> [FieldError]
    write fields
get /attributes/all getExperimentAttributes
    experimentId -> Attributes
    all fields of one object
get /attributes/{type} get{Type}Attribute
    experimentId attribute -> {Type}Attribute
    a field of that type
get /attributes/floatSeries/values getFloatSeriesValues
    experimentId attribute #offset #limit -> FloatPoints
    points of a series of numbers
get /attributes/stringSeries/values getStringSeriesValues
    experimentId attribute #offset #limit -> StringPoints
    points of a series of strings
post /leaderboard/entries/search searchLeaderboardEntries
    projectIdentifier *type {params} -> Anything
    table query in NQL
post /leaderboard/attributes/search searchLeaderboardAttributes
    projectIdentifier search *type {params} -> Columns
    types of a column
post /attributes/file/upload fileAtomUpload
    experimentIdentifier attribute ext -> FieldErrors
    upload a file whole
post /attributes/file/multipart/start fileAtomMultipartUploadStart
    experimentIdentifier attribute ext totalLength -> Upload
    start a file in parts
post /attributes/file/multipart/part fileAtomMultipartUploadPart
    experimentIdentifier attribute uploadId uploadPartIdx -> FieldErrors
    send a part
post /attributes/file/multipart/finish fileAtomMultipartUploadFinish
    experimentIdentifier attribute uploadId -> FieldErrors
    put the parts together
post /attributes/fileset/upload fileSetFileUpload
    experimentIdentifier attribute subPath -> FieldErrors
    upload a file of a file set whole
post /attributes/fileset/multipart/start fileSetFileMultipartUploadStart
    experimentIdentifier attribute subPath totalLength -> Upload
    start a file of a file set in parts
post /attributes/fileset/multipart/part fileSetFileMultipartUploadPart
    experimentIdentifier attribute subPath uploadId uploadPartIdx -> FieldErrors
    send a part
post /attributes/fileset/multipart/finish fileSetFileMultipartUploadFinish
    experimentIdentifier attribute subPath uploadId -> FieldErrors
    put the parts together
post /attributes/fileset/tar uploadFileSetAttributeTar
    experimentId attribute reset -> FieldErrors
    upload small files of a file set as tar.gz
get /attributes/file/download downloadAttribute
    experimentId attribute -> -
    download a file
post /attributes/fileset/zip prepareForDownloadFileSetAttributeZip
    experimentId attribute -> Download
    ask for a file set as zip
get /attributes/fileset/zip getDownloadPrepareRequest
    id -> Download
    where that zip is
get /attributes/fileset/zip/download downloadFileSetZip
    id -> -
    download a file set as zip
get /attributes/fileset/ls lsFileSetAttribute
    experimentId attribute path -> [FileEntry]
    list a folder of a file set
artifacts:
post /artifacts createNewArtifact
    projectIdentifier hash #size parentIdentifier -> Artifact
    record an artifact that stays where it is (track_files)
post /artifacts/files uploadArtifactFilesMetadata
    projectIdentifier hash {artifactFilesDTO} -> Artifact
    record its files
post /artifacts/version createArtifactVersion
    projectIdentifier hash parentIdentifier {artifactFilesDTO} -> Artifact
    add files to an artifact
get /artifacts/files listArtifactFiles
    projectIdentifier hash -> ArtifactFiles
    files of an artifact
"""
